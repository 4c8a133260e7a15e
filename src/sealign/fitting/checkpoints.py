"""Finished batches kept on disk, so that a killed run continues where it stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sealign.files import map_tensors, new_file, read_tensors, write_tensors
from sealign.models.fingerprint import weights_digest

SUMS_NAME = "sums.safetensors"


@dataclass(frozen=True)
class BatchStore:
    """Finished batches on disk, below a folder named by everything that they depend on."""

    folder: Path | None

    @classmethod
    def open(
        cls,
        checkpoint_dir: str | Path | None,
        model: nn.Module,
        depends_on: object,
    ) -> BatchStore:
        """Return the store below a folder for one model and one set of inputs; a store of nothing if None.

        Args:
            checkpoint_dir: the folder.
            model: its weights are part of the store's name.
            depends_on: everything else that the batches depend on; its JSON is part of the name.
        """
        if checkpoint_dir is None:
            return cls(None)
        key = hashlib.sha256(weights_digest(model))
        key.update(json.dumps(depends_on).encode())
        return cls(Path(checkpoint_dir) / f"activations-{key.hexdigest()[:24]}")

    def _path(self, stage: str, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{stage}-{number:06d}.safetensors"

    def load(self, stage: str, number: int) -> dict[str, Tensor] | None:
        """Return a finished batch of a stage, or None if it is not there."""
        if self.folder is None or not self._path(stage, number).is_file():
            return None
        return read_tensors(self._path(stage, number))

    def save(self, stage: str, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep a finished batch of a stage, whole or not at all."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_tensors(self._path(stage, number), tensors)

    def load_sums(self) -> dict[str, Tensor] | None:
        """Return the sums that were saved last, mapped from their file, or None if there are none."""
        if self.folder is None or not (self.folder / SUMS_NAME).is_file():
            return None
        return load_file(self.folder / SUMS_NAME)

    def save_sums(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep sums in float64 in place of those saved before, whole or not at all; they may be larger than memory."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with new_file(self.folder / SUMS_NAME) as temporary, temporary.open("w+b") as file:
                mapped = map_tensors(file, {name: tensor.shape for name, tensor in tensors.items()}, torch.float64)
                for name, tensor in tensors.items():
                    mapped[name].copy_(tensor)

    def clear(self) -> None:
        """Remove the batches once all of them are in the result."""
        if self.folder is not None and self.folder.is_dir():
            shutil.rmtree(self.folder)  # with what a kill in the middle of a write left there
