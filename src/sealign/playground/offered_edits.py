"""The edits that a playground offers: loaded once, checked against the model, combined as each request asks."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sealign.edits.attach import apply_edit
from sealign.edits.intervention import Intervention
from sealign.edits.provenance import warn_of_other_tokenizer
from sealign.edits.record import CARD_NAME, RECORD_NAME
from sealign.edits.strength import MAX_STRENGTH, check_strength
from sealign.errors import EditFileError, SealignWarning, SettingError, unknown_name
from sealign.evaluation.effect_card import write_effect
from sealign.methods.composition import Composition
from sealign.methods.edit_sources import edited_layers, strength_remark
from sealign.methods.registry import load_edit
from sealign.serving.settings import check_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sealign.evaluation.comparison import EditReport
    from sealign.evaluation.results import Results


@dataclass(frozen=True)
class OfferedEdit:
    """An edit under its name in the playground.

    Attributes:
        name: Name of the edit.
        edit: The edit at its own strength.
        remarks: Sentences about how the model differs from the one that the edit was fitted on.
        evaluated: Results of its evaluation and what they say of it; None if it was not evaluated.
    """

    name: str
    edit: Intervention
    remarks: tuple[str, ...]
    evaluated: tuple[Results, EditReport] | None = None

    def describe(self) -> dict[str, Any]:
        """Return what the page shows of the edit, as values that JSON can hold."""
        own = self.edit.strength
        return {
            "name": self.name,
            "method": self.edit.method,
            "site": self.edit.record.site,
            "layers": edited_layers(self.edit),
            "strength": own,
            "slider": None if own is None else 4 * abs(own) or 1.0,
            "max_strength": MAX_STRENGTH,
            "remarks": list(self.remarks),
        }


class OfferedEdits:
    """Edits by name for one model.

    Which edits act, and how strongly, is not kept here: each request says it.

    Args:
        model: The base model.
        tokenizer: Tokenizer of the model.
        edits: Mapping from name to edit.
        folder: Folder whose subfolders may be loaded later; None if nothing is.
        ignore_mismatch: Whether to accept a model with another fingerprint.

    Attributes:
        initial: The edits that were given at the start, which every page shows.
        ignore_mismatch: Whether a model with another fingerprint is accepted.

    Raises:
        FingerprintError, SiteError: An edit does not fit the model.
        SettingError: A conversation does not support a method.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        edits: Mapping[str, Intervention],
        *,
        folder: Path | None = None,
        ignore_mismatch: bool = False,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._folder = None if folder is None else folder.resolve()
        self.ignore_mismatch: bool = ignore_mismatch
        self.initial: list[OfferedEdit] = [self._check(name, edit) for name, edit in edits.items()]
        self._offered = {offered.name: offered for offered in self.initial}

    def folders(self) -> list[str] | None:
        """Return the paths of the edits in the folder, relative to it and sorted; None if there is no folder."""
        if self._folder is None:
            return None
        found = self._folder.rglob(RECORD_NAME)
        return sorted(str(path.parent.relative_to(self._folder)) for path in found if self._is_inside(path.parent))

    def load(self, path: str) -> OfferedEdit:
        """Return the edit at a path inside the folder, loaded anew.

        Args:
            path: Path relative to the folder, or absolute.

        Raises:
            EditFileError: There is no edit, or it cannot be read.
            SettingError: The path is outside the folder, or nothing may be loaded.
            FingerprintError, SiteError: The edit does not fit the model.
        """
        if self._folder is None:
            raise SettingError("this playground loads no edits after its start; start it again with --edits-dir DIR")
        try:
            place = (self._folder / path).resolve()
            found = (place / RECORD_NAME).is_file()
        except (OSError, RuntimeError, ValueError) as error:  # too long, a circle of links, a null character
            raise SettingError(f"{path[:100]!r} is not a path; give the path of an edit in --edits-dir") from error
        if not self._is_inside(place):
            raise SettingError(f"'{path}' is outside the folder of --edits-dir; give the path of an edit inside it")
        if not found:
            listed = ", ".join((self.folders() or [])[:20]) or "none"
            raise EditFileError(f"there is no edit '{path}' in the folder of --edits-dir, which holds: {listed}")
        # A name that no edit of the command line has.
        name = f"/{place.relative_to(self._folder)}"
        self._offered[name] = self._check(name, load_edit(place))
        return self._offered[name]

    def add(self, name: str, edit: Intervention, *, evaluated: tuple[Results, EditReport] | None = None) -> OfferedEdit:
        """Return an edit that was fitted here, under a name that other pages cannot guess.

        Args:
            name: Beginning of the name.
            edit: The edit.
            evaluated: Results of its evaluation and what they say of it, which its card will show.
        """
        unique = f"{name}#{secrets.token_hex(4)}"
        self._offered[unique] = replace(self._check(unique, edit), evaluated=evaluated)
        return self._offered[unique]

    def save(self, name: str, strength: float | None, folder: str) -> Path:
        """Save an edit to a new folder in the folder of edits, and return its path.

        Args:
            name: Name of the edit.
            strength: Strength to save it with.
            folder: Name of the new folder.

        Raises:
            EditFileError: The folder exists.
            ServingError: The name of the folder is not valid.
            SettingError: There is no folder of edits, the edit is unknown, or the strength is out of range.
        """
        if self._folder is None:
            raise SettingError("this playground saves no edits; start it again with --edits-dir DIR")
        path = self._folder / check_name(folder)
        self.write(name, strength, path)
        return path

    def write(self, name: str, strength: float | None, folder: Path) -> Intervention:
        """Write an edit to a new folder, with what is known of its effect in its card; return it at its strength.

        Args:
            name: Name of the edit.
            strength: Strength to write it with.
            folder: The folder.

        Raises:
            EditFileError: The folder exists.
            SettingError: The edit is unknown, or the strength is out of range.
        """
        edit, _ = self.combine([(name, strength)])
        assert edit is not None
        edit.save_pretrained(folder)
        if (evaluated := self._offered[name].evaluated) is not None:
            write_effect(folder / CARD_NAME, edit, *evaluated)
        return edit

    def find(self, name: str) -> OfferedEdit:
        """Return an edit by its name.

        Args:
            name: Name of the edit.

        Raises:
            SettingError: The name is unknown.
        """
        if name not in self._offered:
            raise SettingError(unknown_name("edit", name, self._offered))
        return self._offered[name]

    def combine(self, strengths: Sequence[tuple[str, float | None]]) -> tuple[Intervention | None, list[str]]:
        """Return the edits that a request switches on as one, or None if there is none, and remarks on strengths.

        Args:
            strengths: Name and strength of each edit, in the order in which they act; None for a method that has none.

        Raises:
            SettingError: A name is unknown or given twice, or a strength is out of range, missing or not supported.
        """
        parts: list[Intervention] = []
        remarks: list[str] = []
        for name, strength in strengths:
            edit = self.find(name).edit
            if [given for given, _ in strengths].count(name) > 1:
                raise SettingError(f"the edit '{name}' is given twice; leave one out")
            if strength is not None:
                value = check_strength(strength)
                if remark := strength_remark(edit, value):
                    remarks.append(f"{name}: {remark}")
                edit = edit.with_strength(value)
            elif edit.strength is not None:
                raise SettingError(f"the strength of the edit '{name}' is missing; give a number")
            parts.append(edit)
        return (None if not parts else parts[0] if len(parts) == 1 else Composition(parts)), remarks

    def _is_inside(self, place: Path) -> bool:
        return self._folder is not None and place.resolve().is_relative_to(self._folder)

    def _check(self, name: str, edit: Intervention) -> OfferedEdit:
        """Attach an edit once, so that one that does not fit the model is refused now."""
        if edit.prefix:
            raise SettingError(
                f"the edit '{name}' ({edit.method}) puts demonstrations before each prompt, which a conversation does "
                "not support; use sealign generate"
            )
        if not edit.changes_scores:
            raise SettingError(
                f"the edit '{name}' ({edit.method}) chooses among complete answers, so that no token can be compared; "
                "use sealign generate"
            )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SealignWarning)
            if not self.ignore_mismatch:
                warn_of_other_tokenizer(self._tokenizer, edit)
            with apply_edit(self._model, edit, ignore_mismatch=self.ignore_mismatch):
                pass
        remarks = tuple(str(found.message) for found in caught if issubclass(found.category, SealignWarning))
        return OfferedEdit(name, edit, remarks)
