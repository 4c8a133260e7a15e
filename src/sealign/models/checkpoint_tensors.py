"""Tensors of a checkpoint, read one at a time by the names that they have in the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sealign.errors import ExportError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor of a model is stored.

    Attributes:
        file: Path of the safetensors file.
        name: Name in the file, which differs from the name in the model where transformers renames it when it loads.
    """

    file: Path
    name: str

    def read(self) -> Tensor:
        """Return the tensor as it is stored."""
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(self.name)
        return tensor


@dataclass(frozen=True)
class CheckpointTensors:
    """The tensors of a checkpoint by their names in the model; those that are made from several stored ones are absent.

    Attributes:
        folder: Folder of the checkpoint.
        tensors: Mapping from the name in the model to the stored tensor.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]

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


def weight_files(folder: Path) -> list[str]:
    """Return the names of the safetensors files of a checkpoint, in order; empty if it has none.

    Args:
        folder: Folder of the checkpoint.
    """
    if (folder / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    if not (folder / INDEX_NAME).is_file():
        return []
    weight_map = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
    return sorted(set(weight_map.values()))


def checkpoint_tensors(folder: Path, model: Any) -> CheckpointTensors:
    """Return the tensors of a checkpoint by their names in a model, as transformers renames them when it loads.

    Args:
        folder: Folder of the checkpoint, with safetensors files.
        model: The model of transformers; may be on the meta device.

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
    for file in files:
        with safe_open(folder / file, framework="pt") as opened:
            stored |= dict.fromkeys(opened.keys(), folder / file)
    rules, names = get_model_conversion_mapping(model), model.state_dict()
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    found: dict[str, StoredTensor] = {}
    for name in sorted(stored, key=dot_natural_key):  # the order in which transformers applies its rules
        renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, names)
        if renamed not in names and name in names:
            renamed, converted = rename_source_key(name, [], [], model.base_model_prefix, names)
        if converted is None:
            found[renamed] = StoredTensor(stored[name], name)
    return CheckpointTensors(folder, found)
