"""Several changes on one model at once, such as Best-of-N over an edit."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sealign.edits.attach import attach
from sealign.edits.edit import Edit
from sealign.errors import SettingError
from sealign.methods.method import Attached, Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Stack:
    """Changes that are put on a model in order, and taken off together.

    Attributes:
        parts: edits and methods, at least 1.

    Raises:
        SettingError: none are given.
    """

    def __init__(self, parts: Sequence[Edit | Method]) -> None:
        if not parts:
            raise SettingError("a stack of changes is empty; name at least one edit or method")
        self.parts = tuple(parts)

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of its parts' hashes, in order."""
        return hashlib.sha256("+".join(part.hash for part in self.parts).encode()).hexdigest()

    @property
    def prefix(self) -> str:
        """Text that is put before every prompt."""
        return "".join(part.prefix for part in self.parts if isinstance(part, Method))

    @property
    def generates_only(self) -> bool:
        """Whether a part acts on generation alone, so that log-likelihoods are those without it."""
        return any(part.generates_only for part in self.parts if isinstance(part, Method))

    def attach(self, model: PreTrainedModel, *, ignore_mismatch: bool = False) -> Attached:
        """Put all parts on a model until the result is detached.

        Raises:
            FingerprintError, ModelError, SiteError: as ``attach``; nothing is left on the model.
        """
        attached = Attached()
        handles: list[Any] = []

        def switch_all(enabled: bool) -> None:
            for handle in handles:
                handle.switch(enabled)

        attached.on_switch = switch_all
        try:
            for part in self.parts:
                if isinstance(part, Edit):
                    handles.append(attach(model, part, ignore_mismatch=ignore_mismatch))
                else:
                    handles.append(part.attach(model, ignore_mismatch=ignore_mismatch))
                attached.stack.callback(handles[-1].detach)
        except BaseException:
            attached.detach()
            raise
        return attached
