"""Control vectors: what is in the file, and what one cannot carry; test_llama_cpp.py runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import sealign
from sealign.errors import ExportError
from sealign.export.control_vector import export_control_vector, read_control_vector
from sealign.export.gguf import export_gguf_lora
from sealign.export.gguf_file import open_gguf, value_of
from sealign.export.llama_cpp import llama_outputs
from tests.export.made_edits import affine, edit_of, random_edit
from tests.export.tiny_gguf import write_llama
from tests.tiny_models import build_model


@pytest.fixture
def shifts() -> dict[int, sealign.AffineEdit]:
    return {layer: sealign.AffineEdit.constant(torch.randn(48)) for layer in (1, 3)}


def test_the_file(llama: Any, tokenizer: Any, shifts: Any, tmp_path: Path) -> None:
    edit = edit_of(llama, tokenizer, shifts, site="residual", strength=-0.5)
    assert export_control_vector(edit, tmp_path / "vector.gguf") == ["direction.1", "direction.3"]
    reader = open_gguf(tmp_path / "vector.gguf")
    assert value_of(reader, "general.architecture") == "controlvector"
    assert value_of(reader, "controlvector.model_hint") == "llama"
    assert value_of(reader, "controlvector.layer_count") == 2
    assert [(tensor.name, tensor.tensor_type.name) for tensor in reader.tensors] == [
        ("direction.1", "F32"), ("direction.3", "F32"),
    ]  # fmt: skip
    for layer, tensor in zip((1, 3), reader.tensors, strict=True):
        np.testing.assert_allclose(tensor.data, -0.5 * shifts[layer].shift.numpy(), rtol=1e-6)
    rows = read_control_vector(reader, layers=4, width=48)
    assert rows.shape == (3, 48)
    np.testing.assert_array_equal(rows[0], reader.tensors[0].data)
    assert not rows[1].any()
    np.testing.assert_array_equal(rows[2], reader.tensors[1].data)
    export_control_vector(edit, tmp_path / "vector.gguf", architecture="qwen2", overwrite=True)
    assert value_of(open_gguf(tmp_path / "vector.gguf"), "controlvector.model_hint") == "qwen2"
    assert [entry.name for entry in tmp_path.iterdir()] == ["vector.gguf"]


def test_a_mean_difference(llama: Any, tokenizer: Any, demonstrations: Any, tmp_path: Path) -> None:
    config = sealign.MeanDifferenceConfig(strength=1.5, batch_size=4)
    edit = sealign.fit_edit(llama, tokenizer, demonstrations, config=config)
    (layer,) = edit.layers
    assert export_control_vector(edit, tmp_path / "vector.gguf") == [f"direction.{layer}"]
    (tensor,) = open_gguf(tmp_path / "vector.gguf").tensors
    x = torch.zeros(1, 48)
    np.testing.assert_allclose(tensor.data, edit.layer_edits[layer](x, 1.5)[0].numpy(), rtol=1e-6)


def test_a_shift_of_zeros_is_still_a_direction(llama: Any, tokenizer: Any, shifts: Any, tmp_path: Path) -> None:
    edit = edit_of(llama, tokenizer, shifts, site="residual", strength=0.0)
    assert export_control_vector(edit, tmp_path / "vector.gguf") == ["direction.1", "direction.3"]
    assert not any(tensor.data.any() for tensor in open_gguf(tmp_path / "vector.gguf").tensors)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"site": "residual"}, r"at layer 1 the change depends on the activation \(rank 3, scale 0\).*serve it with"),
        ({"site": "residual", "rank": 2, "center": True}, "depends on the activation"),
        ({"site": "residual", "rank": 0, "scale": 0.5, "shift": True}, r"\(rank 0, scale 0.5\)"),
        (
            {"site": "mlp", "rank": 0, "shift": True},
            "acts on the site 'mlp', but a control vector is added to the resid",
        ),
        ({"site": "attention", "rank": 0, "shift": True}, "acts on the site 'attention'"),
        ({"site": "residual", "rank": 0, "shift": True, "normalization": "token"}, "is rescaled per token"),
        ({"site": "residual", "rank": 0, "shift": True, "layers": (0, 2)}, "acts on layer 0, but llama.cpp adds"),
        ({"site": "residual", "rank": 0, "shift": True, "strength": 1e39}, "layer 1 is not finite in float32; use a"),
    ],
)
def test_what_a_control_vector_cannot_carry(
    llama: Any, tokenizer: Any, tmp_path: Path, settings: Any, words: str
) -> None:
    with pytest.raises(ExportError, match=words):
        export_control_vector(random_edit(llama, tokenizer, **settings), tmp_path / "vector.gguf")
    assert list(tmp_path.iterdir()) == []


def test_an_edit_of_leace_is_refused_with_the_remedy(
    llama: Any, tokenizer: Any, demonstrations: Any, tmp_path: Path
) -> None:
    edit = sealign.fit_edit(llama, tokenizer, demonstrations, config=sealign.LEACEConfig(layers=(2,), batch_size=4))
    with pytest.raises(ExportError, match=r"at layer 2 the change depends on the activation .*; serve it with sealign"):
        export_control_vector(edit, tmp_path / "vector.gguf")


def test_vectors_of_other_models_are_not_read(llama: Any, tokenizer: Any, shifts: Any, tmp_path: Path) -> None:
    export_control_vector(edit_of(llama, tokenizer, shifts, site="residual"), tmp_path / "vector.gguf")
    with pytest.raises(ExportError, match="a tensor 'direction.3', but the model has directions 1 to 2; give"):
        read_control_vector(open_gguf(tmp_path / "vector.gguf"), layers=3, width=48)
    with pytest.raises(
        ExportError, match="has 48 features, but the model has 64; give the GGUF file of its base model"
    ):
        read_control_vector(open_gguf(tmp_path / "vector.gguf"), layers=4, width=64)
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "controlvector")
    writer.add_tensor("direction.0", affine(4).left.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ExportError, match="a tensor 'direction.0'"):
        read_control_vector(open_gguf(tmp_path / "other.gguf"), layers=3, width=48)


@pytest.mark.parametrize("kind", ["LoRA", "control vector"])
def test_a_file_that_needs_its_base_model_is_not_run_without(
    tokenizer: Any, shifts: Any, tmp_path: Path, kind: str
) -> None:
    model, file = build_model("llama", vocab_size=len(tokenizer)), tmp_path / "alone.gguf"
    if kind == "LoRA":
        base = write_llama(model, tmp_path / "base.gguf")
        export_gguf_lora(model, base, random_edit(model, tokenizer), file)
    else:
        export_control_vector(edit_of(model, tokenizer, shifts, site="residual"), file)
    with pytest.raises(ExportError, match=f"is a {kind}, which needs its base model; name the GGUF file of that with"):
        llama_outputs(file, None, tokenizer)
