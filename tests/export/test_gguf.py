"""GGUF files: read back by transformers and by the gguf library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import sealign
from sealign.errors import ExportError
from sealign.export.gguf import _written_type, export_gguf, export_gguf_lora, mean_kept
from sealign.export.gguf_file import base_file, file_names, open_gguf
from sealign.export.lora import lora_factors
from sealign.export.matrix_changes import matrix_changes
from sealign.export.verify import compare_outputs, model_outputs, reference_outputs
from sealign.models.embedded_model import embedded_file
from tests.export.made_edits import affine, edit_of, random_edit
from tests.export.tiny_gguf import write_llama
from tests.tiny_models import build_model


@pytest.fixture(scope="module")
def edit(smollm2: Any) -> sealign.Edit:
    model, tokenizer = smollm2
    demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=12)
    config = sealign.SEAConfig(rank=(3, 2), layers=(27, 29), normalization="none", strength=0.5)
    return sealign.fit_edit(model, tokenizer, demonstrations, config=config)


@pytest.fixture(scope="module")
def embedded() -> gguf.GGUFReader:
    return gguf.GGUFReader(str(embedded_file()))


def _tensors(source: Path | gguf.GGUFReader) -> dict[str, Any]:
    reader = gguf.GGUFReader(str(source)) if isinstance(source, Path) else source
    return {tensor.name: tensor for tensor in reader.tensors}


@pytest.mark.slow
def test_weights_in_a_copy(smollm2: Any, embedded: gguf.GGUFReader, edit: sealign.Edit, tmp_path: Path) -> None:
    target = tmp_path / "edited.gguf"
    with pytest.raises(ExportError, match=r"would be left after rounding to Q4_1.*--lora"):
        export_gguf(smollm2[0], embedded_file(), edit, target)
    assert list(tmp_path.iterdir()) == []
    rewritten = export_gguf(smollm2[0], embedded_file(), edit.with_strength(2), target)
    assert [tensor.name for tensor in rewritten] == ["blk.27.ffn_down.weight", "blk.29.ffn_down.weight"]
    old, new = embedded, gguf.GGUFReader(str(target))
    before, after = _tensors(old), _tensors(new)
    assert list(before) == list(after)
    for name, tensor in before.items():
        if name not in {changed.name for changed in rewritten}:
            assert tensor.tensor_type == after[name].tensor_type
            assert np.array_equal(tensor.data, after[name].data)
    for key, field in old.fields.items():
        if not key.startswith("GGUF."):
            assert new.fields[key].contents() == field.contents(), key
    for layer in (27, 29):
        name = f"blk.{layer}.ffn_down.weight"
        weight = gguf.quants.dequantize(before[name].data, before[name].tensor_type).astype(np.float64)
        found = gguf.quants.dequantize(after[name].data, after[name].tensor_type).astype(np.float64)
        factors = edit.affine_edits[layer]
        expected = weight + 2 * factors.left.double().numpy() @ (factors.right.double().numpy() @ weight)
        kind = before[name].tensor_type
        assert after[name].tensor_type == kind
        again = gguf.quants.dequantize(gguf.quants.quantize(expected.astype(np.float32), kind), kind)
        np.testing.assert_allclose(found, again, atol=1e-6)
        change, wanted = found - weight, expected - weight
        (kept,) = [tensor.kept for tensor in rewritten if tensor.name == name]
        assert kept == pytest.approx((change * wanted).sum() / np.square(wanted).sum(), abs=1e-3)
        assert 0.5 < kept < 0.99  # in four bits, a part of even this change is rounded away, and that is reported
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.slow
def test_a_lora_beside_the_file(smollm2: Any, edit: sealign.Edit, tmp_path: Path) -> None:
    target = tmp_path / "lora.gguf"
    names = export_gguf_lora(smollm2[0], embedded_file(), edit, target)
    assert names == ["blk.27.ffn_down.weight", "blk.29.ffn_down.weight"]
    reader = gguf.GGUFReader(str(target))
    tensors = _tensors(reader)
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["general.type"] == "adapter"
    assert values["adapter.type"] == "lora"
    assert values["adapter.lora.alpha"] == 5.0
    assert values["general.architecture"] == "llama"
    factors = lora_factors(smollm2[0], edit)
    for layer in (27, 29):
        factor = factors[f"model.layers.{layer}.mlp.down_proj"]
        np.testing.assert_array_equal(tensors[f"blk.{layer}.ffn_down.weight.lora_a"].data, factor.a.numpy())
        np.testing.assert_array_equal(tensors[f"blk.{layer}.ffn_down.weight.lora_b"].data, factor.b.numpy())


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_transformers_computes_what_the_hooks_compute(tokenizer: Any, tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    model = build_model("llama", vocab_size=len(tokenizer), intermediate_size=96)
    names = [f"blk.{layer}.ffn_down.weight" for layer in (1, 3)]
    source = write_llama(model, tmp_path / "base.gguf", dict.fromkeys(names, gguf.GGMLQuantizationType[kind]))
    edit = random_edit(model, tokenizer, scale=0.3)
    rewritten = export_gguf(model, source, edit, tmp_path / "edited.gguf")
    assert [(tensor.name, tensor.before, tensor.after) for tensor in rewritten] == [
        (name, kind, kind) for name in names
    ]
    assert mean_kept(rewritten) == pytest.approx(1.0, abs=1e-3)
    settings: Any = {"gguf_file": "edited.gguf", "dtype": torch.float32}
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, **settings).eval()
    base, edited = reference_outputs(model, tokenizer, edit)
    agreement = compare_outputs(
        "gguf", base, edited, model_outputs(loaded, tokenizer), tolerance=1e-4 if kind == "F32" else 0.02
    )
    assert agreement.passed
    assert agreement.mean < (1e-5 if kind == "F32" else 0.02) * agreement.effect


def test_types_that_cannot_be_written() -> None:
    kinds = gguf.GGMLQuantizationType
    assert _written_type(kinds.Q4_1, 1536) == kinds.Q4_1
    assert _written_type(kinds.Q4_K, 1536) == kinds.Q4_0  # both 4.5 bits
    assert _written_type(kinds.Q5_K, 1536) == kinds.Q5_0
    assert _written_type(kinds.Q6_K, 1536) == kinds.Q8_0
    assert _written_type(kinds.Q6_K, 1537) == kinds.F16  # not a multiple of a block


@pytest.fixture(scope="module")
def small(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny GPT-2, whose matrices have biases, and a GGUF file with its output matrices of the MLPs."""
    model = build_model("gpt2", vocab_size=len(tokenizer))
    file = tmp_path_factory.mktemp("small") / "small.gguf"
    writer = gguf.GGUFWriter(None, "gpt2")
    writer.add_block_count(4)
    for layer, block in enumerate(model.transformer.h):
        with torch.no_grad():
            block.mlp.c_proj.bias.normal_(0, 0.1)
        weight = np.ascontiguousarray(block.mlp.c_proj.weight.detach().T.numpy())
        writer.add_tensor(f"blk.{layer}.ffn_down.weight", weight)
        if layer != 2:
            writer.add_tensor(f"blk.{layer}.ffn_down.bias", block.mlp.c_proj.bias.detach().numpy())
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, file


def test_biases_that_the_file_has(tokenizer: Any, small: tuple[Any, Path], tmp_path: Path) -> None:
    model, file = small
    edit = random_edit(model, tokenizer, scale=0.3, shift=True, center=True)
    rewritten = export_gguf(model, file, edit, tmp_path / "edited.gguf")
    names = [f"blk.{layer}.ffn_down.{kind}" for layer in (1, 3) for kind in ("weight", "bias")]
    assert [tensor.name for tensor in rewritten] == names
    assert [tensor.kept for tensor in rewritten] == pytest.approx([1.0] * 4, abs=1e-5)
    assert mean_kept(rewritten) == pytest.approx(1.0, abs=1e-5)
    before, after = _tensors(file), _tensors(tmp_path / "edited.gguf")
    for change in matrix_changes(model, edit):
        name = f"blk.{change.matrix.layer}.ffn_down"
        weight, bias = (torch.tensor(before[f"{name}.{kind}"].data) for kind in ("weight", "bias"))
        np.testing.assert_allclose(after[f"{name}.weight"].data, change.new_weight(weight), atol=1e-6)
        np.testing.assert_allclose(after[f"{name}.bias"].data, change.new_bias(bias), atol=1e-6)


def test_a_pure_shift_changes_biases_only(tokenizer: Any, small: tuple[Any, Path], tmp_path: Path) -> None:
    model, file = small
    edit = edit_of(model, tokenizer, {1: sealign.AffineEdit.constant(torch.ones(48))}, strength=2.0)
    rewritten = export_gguf(model, file, edit, tmp_path / "edited.gguf")
    assert [tensor.name for tensor in rewritten] == ["blk.1.ffn_down.bias"]
    found = _tensors(tmp_path / "edited.gguf")["blk.1.ffn_down.bias"].data - _tensors(file)["blk.1.ffn_down.bias"].data
    np.testing.assert_allclose(found, 2.0, atol=1e-6)


def test_a_bias_that_the_file_lacks(tokenizer: Any, small: tuple[Any, Path], tmp_path: Path) -> None:
    model, file = small
    for layer_edit in (affine(48), sealign.AffineEdit.constant(torch.ones(48))):
        edit = edit_of(model, tokenizer, {2: layer_edit})
        with pytest.raises(ExportError, match=r"the edit needs 'transformer.h.2.mlp.c_proj.bias', which the GGUF file"):
            export_gguf(model, file, edit, tmp_path / "edited.gguf")
    assert list(tmp_path.iterdir()) == []


def test_files_of_other_models(tokenizer: Any, small: tuple[Any, Path], tmp_path: Path) -> None:
    model, file = small
    attention = random_edit(model, tokenizer, site="attention")
    with pytest.raises(ExportError, match="the GGUF file has no tensor for 'transformer.h.1.attn.c_proj.weight'; give"):
        export_gguf(model, file, attention, tmp_path / "x.gguf")
    wide = build_model("gpt2", vocab_size=len(tokenizer), n_embd=64)
    with pytest.raises(ExportError, match="'blk.1.ffn_down.weight' has 48 rows, but the edit has 64 features; give"):
        export_gguf(wide, file, random_edit(wide, tokenizer), tmp_path / "x.gguf")
    writer = gguf.GGUFWriter(tmp_path / "unknown.gguf", "martian")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ExportError, match="does not know the architecture 'martian' of the GGUF file; upgrade"):
        file_names(open_gguf(tmp_path / "unknown.gguf"), model, ["a.weight"])
    with pytest.raises(ExportError, match="not loaded from a GGUF file; name its GGUF file with --base"):
        export_gguf(model, None, random_edit(model, tokenizer), tmp_path / "x.gguf")


def test_the_file_of_a_base_model() -> None:
    assert base_file("smollm2", None) == embedded_file()
    assert base_file("smollm2", Path("x.gguf")) == Path("x.gguf")
    assert base_file("folder/y.gguf", None) == Path("folder/y.gguf")
    assert base_file("owner/name", None) is None


@pytest.mark.slow
def test_refusals(smollm2: Any, edit: sealign.Edit, tmp_path: Path) -> None:
    model, _ = smollm2
    target = tmp_path / "x.gguf"
    with pytest.raises(ExportError, match="there is no file"):
        export_gguf(model, tmp_path / "none.gguf", edit, target)
    (tmp_path / "bad.gguf").write_bytes(b"not a model at all, but long enough to be read as a header")
    with pytest.raises(ExportError, match="cannot be read as GGUF"):
        export_gguf(model, tmp_path / "bad.gguf", edit, target)
    with pytest.raises(ExportError, match="rescaled per token"):
        export_gguf(model, embedded_file(), edit.with_normalization("token"), target)
    assert not target.exists()
