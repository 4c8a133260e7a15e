"""Modules with weights from a checkpoint: the loaded model as oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sealign.errors import ExportError
from sealign.models.checkpoint_modules import loaded_module
from sealign.models.checkpoint_tensors import checkpoint_tensors
from tests.tiny_models import build_model


def _skeleton(model: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model.config).eval()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("llama", "model.layers.2.mlp"),
        ("gpt2", "transformer.h.1.attn"),
        ("qwen3_moe", "model.layers.3.mlp"),  # its experts are stored one by one
        ("gpt_neo", "transformer.h.1.attn"),  # has a mask that is not stored
    ],
)
def test_one_module_is_that_of_the_loaded_model(
    tiny_model: Callable[[str], Any], tmp_path: Path, name: str, path: str
) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    skeleton = _skeleton(model)
    expected = dict(model.get_submodule(path).named_parameters())
    with loaded_module(skeleton, path, checkpoint_tensors(tmp_path, skeleton)) as module:
        found = dict(module.named_parameters())
        assert found.keys() == expected.keys()
        for key, parameter in found.items():
            assert torch.equal(parameter, expected[key])
        assert not any(buffer.is_meta for buffer in module.buffers())
        loaded = sum(not parameter.is_meta for parameter in skeleton.parameters())
        assert loaded == len(expected)
    assert all(parameter.is_meta for parameter in skeleton.parameters())


@pytest.mark.parametrize("how", ["absent", "of another shape"])
def test_a_checkpoint_that_does_not_hold_the_module(tmp_path: Path, how: str) -> None:
    model = build_model("llama", vocab_size=50)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].clone()
    if how == "absent":
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    skeleton = _skeleton(model)
    with (
        pytest.raises(ExportError, match=r"has no 'model.layers.2.mlp.up_proj.weight' of the shape that the model"),
        loaded_module(skeleton, "model.layers.2.mlp", checkpoint_tensors(tmp_path, skeleton)),
    ):
        pass
    assert all(parameter.is_meta for parameter in skeleton.parameters())
