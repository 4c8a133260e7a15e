"""Tensors of a checkpoint under the names that transformers gives them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sealign.errors import ExportError
from sealign.models.checkpoint_tensors import INDEX_NAME, checkpoint_tensors, weight_files
from tests.tiny_models import build_model


@pytest.mark.parametrize("shard_size", ["1GB", "60KB"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_every_tensor_is_the_models_or_is_made_from_several(
    tiny_model: Callable[[str], Any], tmp_path: Path, name: str, shard_size: str
) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(weight_files(tmp_path)) > 1) is (shard_size == "60KB")
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(model.config)  # type: ignore[no-untyped-call]
    found = checkpoint_tensors(tmp_path, skeleton)
    expected = model.state_dict()
    for key, stored in found.tensors.items():
        assert torch.equal(stored.read(), expected[key])
    absent = {key for key in expected if key not in found.tensors}
    if name == "qwen3_moe":  # stored expert by expert
        assert absent
        assert all(".experts." in key for key in absent)
        with pytest.raises(ExportError, match=r"has no tensor '.*experts.*', because it is quantised or stored in"):
            found.find(min(absent))
    else:
        assert absent <= {"lm_head.weight"}  # tied


@pytest.mark.parametrize(("old", "new"), [("model.", ""), ("", "")])
def test_a_checkpoint_of_the_decoder_alone(tmp_path: Path, old: str, new: str) -> None:
    """Without the prefix of the base model, as base models of GPT-2 and others are stored."""
    model = build_model("llama", vocab_size=50)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {key.replace(old, new, 1) if old else key: tensor for key, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = checkpoint_tensors(tmp_path, model).find("model.layers.2.mlp.down_proj.weight")
    assert found.name in renamed
    assert torch.equal(found.read(), model.model.layers[2].mlp.down_proj.weight)


def test_files_of_a_checkpoint_are_fetched_when_they_are_read(tmp_path: Path) -> None:
    model = build_model("llama", vocab_size=50)
    model.save_pretrained(tmp_path / "hub", max_shard_size="30KB")
    files = weight_files(tmp_path / "hub")
    assert len(files) > 3
    (tmp_path / "here").mkdir()
    shutil.copy(tmp_path / "hub" / INDEX_NAME, tmp_path / "here")
    fetched: list[str] = []

    def fetch(file: Path) -> Path:
        assert file.parent == tmp_path / "here"
        fetched.append(file.name)
        return tmp_path / "hub" / file.name

    found = checkpoint_tensors(tmp_path / "here", model, fetch=fetch)
    assert fetched == []
    name = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(found.find(name).read(), model.model.layers[2].mlp.down_proj.weight)
    assert len(fetched) == 1
    save_file({"other": torch.zeros(1)}, tmp_path / "hub" / fetched[0])
    with pytest.raises(ExportError, match=f"does not hold the tensor '{name}'; download the model again"):
        found.find(name).read()


def test_other_formats(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert weight_files(tmp_path) == []
    with pytest.raises(ExportError, match="has no safetensors weights"):
        checkpoint_tensors(tmp_path, build_model("llama", vocab_size=50))
