"""Intervention: what can be attached to a model, saved and loaded, whatever the method that made it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import html
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor

from sealign.edits.handle import EditHandle
from sealign.edits.model_card import model_card
from sealign.edits.record import CARD_NAME, RECORD_NAME, TENSORS_NAME, EditRecord, ModelRecord
from sealign.edits.strength import check_strength
from sealign.errors import SettingError
from sealign.files import tensors_hash, write_tensors
from sealign.folders import new_folder
from sealign.record_files import write_record


class Intervention(ABC):
    """A fitted change of a model: an ``Edit`` of activations, or a change of prompts, decoding or weights.

    Its properties describe what it can do, so that callers need not distinguish classes.

    Attributes:
        record: How it was made.
        changes_scores: Whether it changes the log-likelihoods of given answers; False if it acts on generation only.
        has_own_cache: Whether it keeps a second key-value cache, and so must see a text from its beginning.
    """

    changes_scores: ClassVar[bool] = True
    has_own_cache: ClassVar[bool] = False
    record: EditRecord

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.record.method

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings of the method together with what the fit learned."""
        return self.record.settings

    @property
    def base_model(self) -> ModelRecord:
        """The model that it was fitted on."""
        return self.record.model

    @property
    def fit_seconds(self) -> float:
        """Duration of the fit in seconds."""
        return self.record.fit_seconds

    @property
    def strength(self) -> float | None:
        """Strength: 0 leaves the model unchanged, 1 applies the method in full; None if the method has no strength."""
        return self.record.strength

    @property
    def is_causal(self) -> bool:
        """Whether the edited activation of a token depends on no later token.

        If False, sequences run one at a time and without a cache.
        """
        return True

    @property
    def prefix(self) -> str:
        """Text that belongs before every prompt; empty for most methods."""
        return ""

    @property
    def modules(self) -> list[str]:
        """Dotted paths of the modules whose outputs are edited; empty if activations are not edited."""
        return []

    @property
    def parts(self) -> tuple[Intervention, ...]:
        """The interventions of a composition; the intervention itself if it is a single one."""
        return (self,)

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of everything that decides what an edited model computes, as 64 hexadecimal digits."""
        # Adding 0.0 gives 1 and 1.0, and 0.0 and -0.0, one hash.
        strength = None if self.strength is None else self.strength + 0.0
        parts = [self.method, self._identity(), strength, tensors_hash(self.tensors())]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _identity(self) -> Any:
        """Return everything beside tensors and strength that decides the result, as values that JSON can hold."""
        return [dict(self.settings), self.record.model.fingerprint]

    def _summary(self) -> dict[str, Any]:
        """Return what a user wants to see at a glance; None is not shown."""
        return {"method": self.method, "model": self.base_model.id, "strength": self.strength}

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self._summary().items() if value is not None)
        return f"{type(self).__name__}({shown})"

    def _repr_html_(self) -> str:
        """Return the summary as a table, for notebooks."""
        rows = "".join(
            f"<tr><th>{name}</th><td>{html.escape(str(value))}</td></tr>"
            for name, value in self._summary().items()
            if value is not None
        )
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"

    @classmethod
    @abstractmethod
    def from_record(cls, record: EditRecord, tensors: Mapping[str, Tensor], *, place: str = "edit") -> Intervention:
        """Build the intervention from its record and its tensors, and check that they fit each other.

        Args:
            record: Contents of ``edit.json``.
            tensors: Contents of ``edit.safetensors``.
            place: Name of the folder, for messages.

        Raises:
            EditFileError: The record and the tensors do not fit each other.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are saved, by name, on the CPU."""

    @abstractmethod
    def install(self, model: Any, handle: EditHandle) -> None:
        """Change what a model computes while a handle is active, and push to ``handle.stack`` what undoes the change.

        Called by ``attach`` and ``apply_edit``, which check the model first.

        Args:
            model: The base model.
            handle: Handle of the attached intervention.
        """

    def with_strength(self, strength: float) -> Self:
        """Return the same intervention at another strength.

        Args:
            strength: Any finite number; 0 leaves the model unchanged, 1 applies the method in full.

        Raises:
            SettingError: The strength is not finite, or the method has no strength.
        """
        value = check_strength(strength)
        if self.strength is None:
            raise SettingError(f"strength is {value}, but {self.method} has no strength; leave it out")
        # Every intervention that has a strength is a dataclass.
        return dataclasses.replace(self, record=dataclasses.replace(self.record, strength=value))  # type: ignore[type-var]

    def randomized(self, seed: int) -> Intervention | None:  # noqa: ARG002 - for those that have directions
        """Return the intervention in random directions, as a control, or None if it has no directions.

        Args:
            seed: Seed of the directions.
        """
        return None

    def reversed(self) -> Intervention | None:
        """Return the intervention in the opposite direction, as a control, or None if it has no direction."""
        return None

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write ``edit.json``, ``edit.safetensors`` and a model card to a folder.

        At every moment the folder is absent, the earlier edit or the new one, complete.

        Args:
            folder: Folder to write. Must be new or empty, or an edit's if ``overwrite`` is True.
            overwrite: Whether to replace an edit that is there. Files that are not the edit's are kept.

        Raises:
            EditFileError: The folder holds an edit and ``overwrite`` is False, or holds something else; or a tensor
                does not fit the record, or is not finite.
            SettingError: The record does not describe the edit.
            OSError: The disk is full or not writable.
        """
        tensors = self.tensors()
        record = dataclasses.replace(self.record, tensors_hash=tensors_hash(tensors))
        if type(self).from_record(record, tensors, place=str(folder)).hash != self.hash:
            raise SettingError(
                f"the record does not describe this {self.method} edit, which would be another one when it is loaded; "
                "make the entries of its layers with layer_record"
            )
        with new_folder(Path(folder), mark=RECORD_NAME, overwrite=overwrite) as temporary:
            write_tensors(temporary / TENSORS_NAME, tensors)
            (temporary / RECORD_NAME).write_text(write_record(record), encoding="utf-8")
            (temporary / CARD_NAME).write_text(model_card(record), encoding="utf-8")

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the intervention to a model repository of the Hugging Face Hub, and return the URL of the commit.

        The card says that it was not evaluated; ``push_edit`` uploads a folder whose card shows its effect.

        Args:
            repo_id: Repository as ``owner/name``; created if it does not exist.
            private: Whether a new repository is private.
            token: Access token with write permission; the token of the stored login if None.

        Raises:
            EditFileError: The Hub cannot be reached or refuses the upload.
        """
        from sealign.edits.gallery import push_edit

        with tempfile.TemporaryDirectory() as temporary:
            self.save_pretrained(Path(temporary) / "edit")
            return push_edit(Path(temporary) / "edit", repo_id, private=private, token=token)
