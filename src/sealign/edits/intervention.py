"""Intervention: what can be attached to a model, saved and loaded, whatever the method that made it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor

from sealign.edits.handle import EditHandle
from sealign.edits.model_card import model_card
from sealign.edits.record import CARD_NAME, FORMAT, FORMAT_VERSION, RECORD_NAME, TENSORS_NAME, EditRecord, ModelRecord
from sealign.edits.strength import check_strength
from sealign.errors import EditFileError, SettingError
from sealign.files import (
    locate_folder,
    new_folder,
    read_record,
    read_tensors,
    tensors_hash,
    write_record,
    write_tensors,
)


class Intervention(ABC):
    """Something fitted that is attached to a model: an ``Edit``, or a method that changes prompts, decoding or weights.

    What an intervention cannot do is said by its properties, so that no caller depends on its class.

    Attributes:
        record: How it was made.
        changes_scores: Whether it changes the log-likelihoods of given answers; False if it acts on generation only.
        has_own_cache: Whether it reads along with a second key-value cache, and so must see a text from its beginning.
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
        """How far it goes: 0 is no change, 1 the whole; None if the method has no strength."""
        return self.record.strength

    @property
    def is_causal(self) -> bool:
        """Whether a token's activations depend on earlier tokens only.

        If False, sequences run one at a time and without a cache.
        """
        return True

    @property
    def prefix(self) -> str:
        """Text that is put before every prompt; empty for most methods."""
        return ""

    @property
    def modules(self) -> list[str]:
        """Dotted paths of the modules whose outputs are edited; empty if activations are not edited."""
        return []

    @property
    def parts(self) -> tuple[Intervention, ...]:
        """The interventions that it consists of; itself if it is a single one."""
        return (self,)

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of everything that decides what an edited model computes, as 64 hexadecimal digits."""
        parts = [self.method, self._identity(), self.strength, tensors_hash(self.tensors())]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _identity(self) -> Any:
        """Return what decides the result beside tensors and strength, as JSON-able data."""
        return [dict(self.settings), self.record.model.fingerprint]

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
        """Change what a model computes while the handle is active, and leave on ``handle.stack`` what undoes it.

        Use ``attach`` or ``apply_edit``, which check the model first.

        Args:
            model: The base model.
            handle: Handle of this attachment.
        """

    def with_strength(self, strength: float) -> Self:
        """Return the same intervention at another strength.

        Args:
            strength: Any finite number; 0 is no edit, 1 the whole.

        Raises:
            SettingError: The strength is not finite, or the method has no strength.
        """
        value = check_strength(strength)
        if self.strength is None:
            raise SettingError(f"strength is {value}, but {self.method} has no strength; leave it out")
        return self._with_record(dataclasses.replace(self.record, strength=value))

    def _with_record(self, record: EditRecord) -> Self:
        """Return a copy with another record; implemented by dataclasses."""
        return dataclasses.replace(self, record=record)  # type: ignore[type-var]

    def randomized(self, seed: int) -> Intervention | None:
        """Return the intervention in random directions, as a control, or None if it has no directions.

        Args:
            seed: Seed of the directions.
        """
        return None

    def reversed(self) -> Intervention | None:
        """Return the intervention in the opposite direction, as a control, or None if it has no direction."""
        return None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``edit.json``, ``edit.safetensors`` and a model card to a folder.

        The folder appears whole or not at all; an edit that is already there is replaced.

        Args:
            folder: Folder to write; new, empty, or holding an edit.

        Raises:
            EditFileError: The folder holds something else.
            OSError: The disk is full or not writable.
        """
        tensors = self.tensors()
        record = dataclasses.replace(self.record, tensors_hash=tensors_hash(tensors))
        with new_folder(Path(folder), replaces=RECORD_NAME) as temporary:
            write_tensors(temporary / TENSORS_NAME, tensors)
            (temporary / RECORD_NAME).write_text(write_record(record), encoding="utf-8")
            (temporary / CARD_NAME).write_text(model_card(record), encoding="utf-8")

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the intervention to a model repository of the Hugging Face Hub, and return the URL of the commit.

        Args:
            repo_id: ``owner/name``; created if it does not exist.
            private: Whether a new repository is private.
            token: Access token with write permission; the stored login if None.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: The Hub refuses the upload.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            self.save_pretrained(Path(temporary) / "edit")
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=Path(temporary) / "edit", commit_message="Upload Sealign edit"
            )
        return str(commit.commit_url)


def read_edit_files(
    folder_or_repo_id: str | Path, *, revision: str | None = None
) -> tuple[EditRecord, dict[str, Tensor]]:
    """Read the record and the tensors of a saved edit, and check that they belong together.

    Args:
        folder_or_repo_id: Folder, or repository of the Hub as ``owner/name``.
        revision: Branch, tag or commit of the repository.

    Returns:
        The record and the tensors by name.

    Raises:
        EditFileError: A file is missing, truncated, corrupted, of another format, or was changed.
    """
    folder = locate_folder(folder_or_repo_id, revision=revision)
    file = folder / RECORD_NAME
    if not file.is_file():
        raise EditFileError(f"'{folder}' has no {RECORD_NAME}, so it is not an edit; check the path")
    record = read_record(file, EditRecord, format=FORMAT, format_version=FORMAT_VERSION)
    tensors = read_tensors(folder / TENSORS_NAME)
    if tensors_hash(tensors) != record.tensors_hash:
        raise EditFileError(
            f"the tensors of '{folder}' do not match their hash in {RECORD_NAME}; copy or download the edit again"
        )
    return record, tensors
