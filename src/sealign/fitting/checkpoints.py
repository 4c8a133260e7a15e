"""Finished batches stored on disk, so that an interrupted run continues where it stopped."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from filelock import Timeout
from safetensors.torch import load_file
from torch import Tensor, nn

from sealign.files import hold_lock, new_file, read_tensors, write_tensors
from sealign.fitting.mapped_tensors import map_tensors
from sealign.models.weights import weights_digest

SUMS_NAME = "sums.safetensors"
"""File name of the sums over the demonstrations that have been processed."""


@dataclass(frozen=True)
class BatchStore:
    """Finished batches in a folder whose name contains a hash of everything that they depend on.

    Only the user may read the folder, since activations tell much of the texts that they were computed from.

    Attributes:
        folder: The folder, which is made on the first save; None for a store that saves nothing.
    """

    folder: Path | None

    @classmethod
    @contextmanager
    def open(cls, checkpoint_dir: str | Path | None, model: nn.Module, depends_on: object) -> Iterator[Self]:
        """Yield the store of one model and one set of inputs, which no other run uses until the block ends.

        Of several runs of the same inputs at the same time, each has a folder of its own.

        Args:
            checkpoint_dir: Folder that holds the folder of the store; None for a store that saves nothing.
            model: The model; a digest of its weights is part of the name.
            depends_on: Everything else that the batches depend on; its JSON is part of the name.
        """
        if checkpoint_dir is None:
            yield cls(None)
            return
        key = hashlib.sha256(weights_digest(model))
        key.update(json.dumps(depends_on).encode())
        with _claim_folder(Path(checkpoint_dir), f"activations-{key.hexdigest()[:24]}") as folder:
            yield cls(folder)

    def part(self, start: int, stop: int) -> BatchStore:
        """Return the store of a part of the inputs, in a folder inside this one.

        Args:
            start, stop: Number of the first input of the part, and of the first one after it.
        """
        return BatchStore(None if self.folder is None else self.folder / f"inputs-{start}-{stop}")

    def _make_folder(self) -> Path:
        assert self.folder is not None
        for folder in (self.folder.parent, self.folder):
            folder.mkdir(mode=0o700, exist_ok=True)
        return self.folder

    def _path(self, stage: str, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{stage}-{number:06d}.safetensors"

    def load(self, stage: str, number: int) -> dict[str, Tensor] | None:
        """Return a finished batch, or None if it was not saved.

        Args:
            stage: Name of the stage of the run.
            number: Number of the batch within the stage.

        Raises:
            EditFileError: The file is truncated or corrupted.
        """
        if self.folder is None or not self._path(stage, number).is_file():
            return None
        return read_tensors(self._path(stage, number))

    def save(self, stage: str, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Save a finished batch; the file appears whole or not at all.

        Args:
            stage: Name of the stage of the run.
            number: Number of the batch within the stage.
            tensors: Contents by name.
        """
        if self.folder is not None:
            self._make_folder()
            write_tensors(self._path(stage, number), tensors, private=True)

    def load_sums(self) -> dict[str, Tensor] | None:
        """Return the saved sums, mapped from their file, or None if none were saved."""
        if self.folder is None or not (self.folder / SUMS_NAME).is_file():
            return None
        return load_file(self.folder / SUMS_NAME)

    def save_sums(self, tensors: Mapping[str, Tensor]) -> None:
        """Save sums in float64 in place of earlier ones; the file is replaced whole or not at all.

        Args:
            tensors: Sums by name; they may be larger than memory.
        """
        if self.folder is not None:
            path = self._make_folder() / SUMS_NAME
            with new_file(path, private=True) as temporary, temporary.open("w+b") as file:
                mapped = map_tensors(file, {name: tensor.shape for name, tensor in tensors.items()}, torch.float64)
                for name, tensor in tensors.items():
                    mapped[name].copy_(tensor)

    def clear(self) -> None:
        """Remove everything that was saved, including the temporary files of an interrupted save."""
        if self.folder is not None and self.folder.is_dir():
            shutil.rmtree(self.folder)


@contextmanager
def _claim_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield the first folder ``parent / NAME-NUMBER`` that no other run holds; those with saved batches come first."""
    parent.mkdir(parents=True, exist_ok=True)
    saved = sorted(path.name for path in parent.glob(f"{name}-*") if path.is_dir())
    for candidate in itertools.chain(saved, (f"{name}-{number}" for number in itertools.count())):
        stack = ExitStack()
        try:
            stack.enter_context(hold_lock(parent / f"{candidate}.lock", timeout=0))
        except Timeout:
            continue
        with stack:
            yield parent / candidate
        return
