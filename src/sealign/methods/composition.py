"""Several interventions on one model at once, such as Best-of-N over an edit."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sealign.edits.attach import attach
from sealign.edits.handle import EditHandle
from sealign.edits.intervention import Intervention
from sealign.edits.record import EditRecord, ModelRecord
from sealign.errors import SettingError


class Composition(Intervention):
    """Interventions that are attached in order and detached together.

    Args:
        parts: Interventions in the order in which they are attached; must not be empty. At a common module, a later
            edit acts on the result of an earlier one.

    Raises:
        SettingError: No part is given.
    """

    def __init__(self, parts: Sequence[Intervention]) -> None:
        if not parts:
            raise SettingError("parts is empty, but a composition needs at least 1; name an edit or a method")
        self._parts = tuple(parts)

    @property
    def parts(self) -> tuple[Intervention, ...]:
        """The interventions, in order."""
        return self._parts

    @property
    def method(self) -> str:
        """Names of the parts' methods, joined by a plus."""
        return "+".join(part.method for part in self._parts)

    @property
    def record(self) -> EditRecord:  # type: ignore[override]
        """Raise: each part has a record of its own.

        Raises:
            SettingError: Always.
        """
        raise SettingError(
            f"'{self.method}' is a composition, which has no record of its own; use the records of its parts"
        )

    @property
    def base_model(self) -> ModelRecord:
        """The model that the first part was fitted on."""
        return self._parts[0].base_model

    @property
    def fit_seconds(self) -> float:
        """Duration of all fits in seconds."""
        return sum(part.fit_seconds for part in self._parts)

    @property
    def strength(self) -> None:
        """None: each part has a strength of its own."""
        return None

    @property
    def is_causal(self) -> bool:
        """Whether all parts are causal."""
        return all(part.is_causal for part in self._parts)

    @property
    def changes_scores(self) -> bool:  # type: ignore[override]
        """Whether all parts act on the log-likelihoods of given answers, so that none is left out of them."""
        return all(part.changes_scores for part in self._parts)

    @property
    def has_own_cache(self) -> bool:  # type: ignore[override]
        """Whether a part reads along with a second key-value cache."""
        return any(part.has_own_cache for part in self._parts)

    @property
    def prefix(self) -> str:
        """Text that the parts put before every prompt, in order."""
        return "".join(part.prefix for part in self._parts)

    @property
    def modules(self) -> list[str]:
        """Dotted paths of all edited modules, each once."""
        return list(dict.fromkeys(module for part in self._parts for module in part.modules))

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of the parts' hashes, in order."""
        return hashlib.sha256("+".join(part.hash for part in self._parts).encode()).hexdigest()

    @classmethod
    def from_record(  # with the arguments of the base class
        cls,
        record: EditRecord,  # noqa: ARG003
        tensors: Mapping[str, Tensor],  # noqa: ARG003
        *,
        place: str = "edit",
    ) -> Composition:
        """Raise: a composition is not saved, its parts are.

        Raises:
            SettingError: Always.
        """
        raise SettingError(f"'{place}' cannot be a composition, since compositions are not saved; load its parts")

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:  # noqa: ARG002
        """Raise: save the parts instead.

        Raises:
            SettingError: Always.
        """
        raise SettingError(f"a composition cannot be saved to '{folder}'; save its parts")

    def tensors(self) -> dict[str, Tensor]:
        """Return an empty dictionary: the parts hold the tensors."""
        return {}

    def install(self, model: Any, handle: EditHandle) -> None:
        """Attach all parts in order.

        Raises:
            FingerprintError, ModelError, SiteError: As for ``attach``; nothing is left on the model.
        """
        handles: list[EditHandle] = []
        for part in self._parts:
            # The composition was checked against the model as a whole.
            handles.append(attach(model, part, ignore_mismatch=True))
            handle.stack.callback(handles[-1].detach)

        def switch_all(enabled: bool) -> None:
            for own in handles:
                own.switch(enabled)

        handle.on_switch = switch_all
