"""Single modules of a model with their weights from a checkpoint, while the rest of the model has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sealign.errors import ExportError
from sealign.models.checkpoint_tensors import CheckpointTensors
from sealign.models.module_calls import made_up
from sealign.models.pretrained import quiet_transformers


@contextmanager
def loaded_module(model: Any, path: str, checkpoint: CheckpointTensors) -> Iterator[nn.Module]:
    """Load the weights of one module as transformers loads them, and drop them at the end of the ``with`` block.

    Buffers that no checkpoint stores, such as tables of positions, get made-up values.

    Args:
        model: A model of transformers on the meta device.
        path: Dotted path of the module.
        checkpoint: Tensors of the model, of which only those of the module are read.

    Raises:
        ExportError: The checkpoint lacks a weight of the module, or holds one of another shape.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    stored = {tensor.name: tensor.read() for tensor in checkpoint.of_module(path)}
    rules: Any = get_model_conversion_mapping(model)
    settings = LoadStateDictConfig(weight_mapping=rules)
    module: nn.Module = model.get_submodule(path)
    try:
        with quiet_transformers():
            convert_and_load_state_dict_in_model(model, stored, settings)
        absent = [name for name, parameter in module.named_parameters() if parameter.is_meta]
        if absent:
            raise ExportError(
                f"the checkpoint '{checkpoint.folder}' has no '{path}.{absent[0]}' of the shape that the model needs; "
                "download the base model again"
            )
        _fill_buffers(module)
        yield module
    finally:
        module.to("meta")


def _fill_buffers(module: nn.Module) -> None:
    values = torch.Generator().manual_seed(1)
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            owner, _, last = name.rpartition(".")
            setattr(module.get_submodule(owner), last, made_up(buffer, values))
