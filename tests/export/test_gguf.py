"""GGUF files: read back by transformers and by the gguf library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import sealign
from sealign.errors import ExportError
from sealign.export.gguf import _write, _written_type, export_gguf, export_gguf_lora
from sealign.export.lora import lora_factors
from sealign.export.verify import compare_outputs, model_outputs, reference_outputs
from sealign.models.embedded_model import embedded_file

F16 = gguf.GGMLQuantizationType.F16

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def edit(smollm2: Any) -> sealign.Edit:
    model, tokenizer = smollm2
    learnt = sealign.load_demonstrations("bundled:truthfulness", limit=12)
    config = sealign.FitConfig(rank=(3, 2), layers=(27, 29), normalization="none", strength=0.5)
    return sealign.fit_edit(model, tokenizer, learnt, config=config)


def _tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}


def test_weights_in_a_copy(smollm2: Any, edit: sealign.Edit, tmp_path: Path) -> None:
    target = tmp_path / "edited.gguf"
    with pytest.raises(ExportError, match=r"would be left after rounding to Q4_1.*--lora"):
        export_gguf(smollm2[0], embedded_file(), edit, target)
    assert list(tmp_path.iterdir()) == []
    rewritten = export_gguf(smollm2[0], embedded_file(), edit.with_settings(strength=2), target)
    assert [tensor.name for tensor in rewritten] == ["blk.27.ffn_down.weight", "blk.29.ffn_down.weight"]
    before, after = _tensors(embedded_file()), _tensors(target)
    assert list(before) == list(after)
    for name, tensor in before.items():
        if name not in {changed.name for changed in rewritten}:
            assert tensor.tensor_type == after[name].tensor_type
            assert np.array_equal(tensor.data, after[name].data)
    old, new = gguf.GGUFReader(str(embedded_file())), gguf.GGUFReader(str(target))
    for key, field in old.fields.items():
        if not key.startswith("GGUF."):
            assert new.fields[key].contents() == field.contents(), key
    for layer in (27, 29):
        name = f"blk.{layer}.ffn_down.weight"
        weight = gguf.quants.dequantize(before[name].data, before[name].tensor_type).astype(np.float64)
        found = gguf.quants.dequantize(after[name].data, after[name].tensor_type).astype(np.float64)
        projection = edit.projections[layer]
        u, v = projection.positive.double().numpy(), projection.negative.double().numpy()
        expected = weight + 2 * (u @ (u.T @ weight) - v @ (v.T @ weight))
        kind = before[name].tensor_type
        assert after[name].tensor_type == kind
        again = gguf.quants.dequantize(gguf.quants.quantize(expected.astype(np.float32), kind), kind)
        np.testing.assert_allclose(found, again, atol=1e-6)
        change, wanted = found - weight, expected - weight
        (told,) = [tensor.kept for tensor in rewritten if tensor.name == name]
        assert told == pytest.approx((change * wanted).sum() / np.square(wanted).sum(), abs=1e-3)
        assert 0.5 < told < 0.99  # in four bits, some of even this change is rounded away, and that is said
    assert list(tmp_path.iterdir()) == [target]


def test_a_lora_beside_the_file(smollm2: Any, edit: sealign.Edit, tmp_path: Path) -> None:
    target = tmp_path / "lora.gguf"
    names = export_gguf_lora(smollm2[0], embedded_file(), edit, target)
    assert names == ["blk.27.ffn_down.weight", "blk.29.ffn_down.weight"]
    reader, tensors = gguf.GGUFReader(str(target)), _tensors(target)
    told = {key: field.contents() for key, field in reader.fields.items()}
    assert told["general.type"] == "adapter"
    assert told["adapter.type"] == "lora"
    assert told["adapter.lora.alpha"] == 5.0
    assert told["general.architecture"] == "llama"
    factors = lora_factors(smollm2[0], edit)
    for layer in (27, 29):
        factor = factors[f"model.layers.{layer}.mlp.down_proj"]
        np.testing.assert_array_equal(tensors[f"blk.{layer}.ffn_down.weight.lora_a"].data, factor.a.numpy())
        np.testing.assert_array_equal(tensors[f"blk.{layer}.ffn_down.weight.lora_b"].data, factor.b.numpy())


def test_transformers_computes_what_the_hooks_compute(smollm2: Any, edit: sealign.Edit, tmp_path: Path) -> None:
    """From a base file whose edited tensors are 16 bits wide, so that rounding hides nothing."""
    model, tokenizer = smollm2
    names = [f"blk.{layer}.ffn_down.weight" for layer in (27, 29)]
    tensors = _tensors(embedded_file())
    wide = {
        name: (gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type).astype(np.float16), F16)
        for name in names
    }
    _write(gguf.GGUFReader(str(embedded_file())), tmp_path / "wide.gguf", wide)
    rewritten = export_gguf(model, tmp_path / "wide.gguf", edit, tmp_path / "edited.gguf")
    assert [(tensor.before, tensor.after) for tensor in rewritten] == [("F16", "F16")] * 2
    assert [tensor.kept for tensor in rewritten] == pytest.approx([1.0, 1.0], abs=1e-3)
    loaded, _ = sealign.load_model(str(tmp_path / "edited.gguf"), dtype="float32", device="cpu")
    base, edited = reference_outputs(model, tokenizer, edit)
    agreement = compare_outputs("gguf", base, edited, model_outputs(loaded, tokenizer), tolerance=0.02)
    assert agreement.passed
    assert agreement.mean < 0.02 * agreement.effect


def test_types_that_cannot_be_written() -> None:
    kinds = gguf.GGMLQuantizationType
    assert _written_type(kinds.Q4_1, 1536) == kinds.Q4_1
    assert _written_type(kinds.Q4_K, 1536) == kinds.Q4_0  # both 4.5 bits
    assert _written_type(kinds.Q5_K, 1536) == kinds.Q5_0
    assert _written_type(kinds.Q6_K, 1536) == kinds.Q8_0
    assert _written_type(kinds.Q6_K, 1537) == kinds.F16  # not a multiple of a block


def test_refusals(smollm2: Any, edit: sealign.Edit, tmp_path: Path) -> None:
    model, _ = smollm2
    target = tmp_path / "x.gguf"
    with pytest.raises(ExportError, match="there is no file"):
        export_gguf(model, tmp_path / "none.gguf", edit, target)
    (tmp_path / "bad.gguf").write_bytes(b"not a model at all, but long enough to be read as a header")
    with pytest.raises(ExportError, match="cannot be read as GGUF"):
        export_gguf(model, tmp_path / "bad.gguf", edit, target)
    with pytest.raises(ExportError, match="rescaled per token"):
        export_gguf(model, embedded_file(), edit.with_settings(normalization="token"), target)
    assert not target.exists()
