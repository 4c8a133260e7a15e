"""Tensors of a checkpoint, read one at a time by the names that they have in the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sealign.errors import ExportError

Fetch = Callable[[Path], Path]
"""Function that downloads a file of a checkpoint, given the path in its folder, and returns its path."""

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor of a model is stored.

    Attributes:
        file: Path of the safetensors file.
        name: Name in the file, which differs from the name in the model where transformers renames it when it loads.
        fetch: Function that downloads the file and returns its path; None if it is there.
    """

    file: Path
    name: str
    fetch: Fetch | None = None

    def read(self) -> Tensor:
        """Return the tensor as it is stored.

        Raises:
            ExportError: The file does not hold it.
        """
        from safetensors import SafetensorError, safe_open

        file = self.file if self.fetch is None else self.fetch(self.file)
        try:
            with safe_open(file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(self.name)
        except SafetensorError as error:
            raise ExportError(f"'{file}' does not hold the tensor '{self.name}'; download the model again") from error
        return tensor


@dataclass(frozen=True)
class CheckpointTensors:
    """The tensors of a checkpoint by their names in the model.

    Attributes:
        folder: Folder of the checkpoint.
        tensors: Mapping from the name in the model to the stored tensor.
        parts: Mapping from the name in the model to the stored tensors that transformers makes this tensor, and
            perhaps others beside it, from.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]
    parts: Mapping[str, Sequence[StoredTensor]]

    def find(self, name: str) -> StoredTensor:
        """Return where a tensor is stored.

        Args:
            name: Name in the model.

        Raises:
            ExportError: The checkpoint does not store this tensor by itself.
        """
        if name not in self.tensors:
            raise ExportError(
                f"the checkpoint '{self.folder}' has no tensor '{name}', because it is quantised or stored in another "
                "layout; use the original checkpoint"
            )
        return self.tensors[name]

    def of_module(self, path: str) -> list[StoredTensor]:
        """Return all stored tensors that the parameters and buffers of a module are loaded from.

        Args:
            path: Dotted path of the module in the model.
        """
        single = [stored for name, stored in self.tensors.items() if name.startswith(f"{path}.")]
        return single + [part for name, parts in self.parts.items() if name.startswith(f"{path}.") for part in parts]


def weight_files(folder: Path) -> list[str]:
    """Return the names of the safetensors files of a checkpoint, in order; empty if it has none.

    Args:
        folder: Folder of the checkpoint.
    """
    if (folder / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    if not (folder / INDEX_NAME).is_file():
        return []
    return sorted(set(_weight_map(folder).values()))


def _weight_map(folder: Path) -> dict[str, str]:
    """Return the name of the file of each tensor, as the index says."""
    found: dict[str, str] = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
    return found


def checkpoint_tensors(folder: Path, model: Any, *, fetch: Fetch | None = None) -> CheckpointTensors:
    """Return the tensors of a checkpoint by their names in a model, as transformers renames them when it loads.

    Args:
        folder: Folder of the checkpoint, with safetensors files.
        model: The model of transformers; may be on the meta device.
        fetch: Function that downloads a safetensors file when a tensor is read from it; the folder then holds the index
            of the files. None if the folder holds the files.

    Raises:
        ExportError: The folder has no safetensors files.
    """
    from safetensors import safe_open
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    files = weight_files(folder)
    if not files:
        raise ExportError(
            f"'{folder}' has no safetensors weights; save the model with save_pretrained and export from that folder"
        )
    stored: dict[str, Path] = {}
    if fetch is not None:
        stored = {name: folder / file for name, file in _weight_map(folder).items()}
    for file in files if fetch is None else ():
        with safe_open(folder / file, framework="pt") as opened:
            stored |= dict.fromkeys(opened.keys(), folder / file)
    rules, names = get_model_conversion_mapping(model), model.state_dict()
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    found: dict[str, StoredTensor] = {}
    parts: dict[str, list[StoredTensor]] = {}
    for name in sorted(stored, key=dot_natural_key):  # the order in which transformers applies its rules
        renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, names)
        if renamed not in names and name in names:
            renamed, converted = rename_source_key(name, [], [], model.base_model_prefix, names)
        tensor = StoredTensor(stored[name], name, fetch)
        if converted is None:
            found[renamed] = tensor
        else:
            parts.setdefault(renamed, []).append(tensor)
    return CheckpointTensors(folder, found, parts)
