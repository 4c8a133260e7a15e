"""GGUF exports run by llama.cpp itself, through ``sealign verify`` in the environment of ``make engines-env``."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import sealign
from sealign.export.control_vector import export_control_vector
from sealign.export.gguf import export_gguf, export_gguf_lora
from sealign.models.embedded_model import embedded_file
from tests.edit_server import engine_command
from tests.export.made_edits import affine, edit_of
from tests.export.tiny_gguf import write_llama
from tests.tiny_models import build_model

pytestmark = [pytest.mark.engines, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def edit(smollm2: Any, folder: Path) -> sealign.Edit:
    model, tokenizer = smollm2
    demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=12)
    config = sealign.SEAConfig(layers="last:10", rank=(4, 9), normalization="none", combine="negative")
    made = sealign.fit_edit(model, tokenizer, demonstrations, config=config)
    made.save_pretrained(folder / "edit")
    return made


@pytest.fixture(scope="module")
def wide_base(folder: Path) -> Path:
    """The embedded model's file with every tensor in float32, where llama.cpp rounds nothing."""
    reader = gguf.GGUFReader(str(embedded_file()))
    writer = gguf.GGUFWriter(folder / "wide.gguf", "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != gguf.Keys.General.ARCHITECTURE:
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=element)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "wide.gguf"


def run_verify(edit: Path, file: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [engine_command("sealign"), "verify", "--edit", str(edit), "--against", f"gguf={file}", *more]
    return subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=600)


def verify(edit: Path, file: Path, *more: str) -> tuple[int, dict[str, Any]]:
    result = run_verify(edit, file, *more)
    assert result.returncode in (0, 1), result.stderr
    (agreement,) = json.loads(result.stdout)
    return result.returncode, agreement


def test_a_lora_beside_float32_weights_equals_the_hooks(
    smollm2: Any, edit: sealign.Edit, wide_base: Path, folder: Path
) -> None:
    export_gguf_lora(smollm2[0], wide_base, edit, folder / "lora.gguf")
    code, agreement = verify(folder / "edit", folder / "lora.gguf", "--base", str(wide_base))
    assert code == 0, agreement
    assert agreement["share"] == pytest.approx(1.0, abs=0.01)
    assert agreement["same_tokens"] == 1.0


def test_float32_weights_with_the_edit_equal_the_hooks(
    smollm2: Any, edit: sealign.Edit, wide_base: Path, folder: Path
) -> None:
    export_gguf(smollm2[0], wide_base, edit, folder / "edited.gguf")
    code, agreement = verify(folder / "edit", folder / "edited.gguf")
    assert code == 0, agreement
    assert agreement["share"] == pytest.approx(1.0, abs=0.01)
    # The base file is a deployment in which the edit does nothing.
    code, agreement = verify(folder / "edit", wide_base)
    assert code == 1
    assert agreement["share"] == pytest.approx(0.0, abs=0.01)


def test_the_embedded_file_with_a_lora(smollm2: Any, edit: sealign.Edit, folder: Path) -> None:
    """In four bits llama.cpp rounds activations too, so its figures are near and not equal."""
    export_gguf_lora(smollm2[0], embedded_file(), edit, folder / "narrow.gguf")
    code, agreement = verify(folder / "edit", folder / "narrow.gguf", "--tolerance", "1.0")
    assert code == 0, agreement
    assert agreement["share"] == pytest.approx(1.0, abs=0.1)
    assert agreement["mean"] < 0.2 * agreement["effect"]


@pytest.fixture(scope="module")
def tiny(tokenizer: Any, folder: Path) -> tuple[Any, Path]:
    """A tiny Llama of 4 layers in a folder, and its GGUF file in float32."""
    model = build_model("llama", vocab_size=len(tokenizer))
    model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    return model, write_llama(model, folder / "tiny.gguf")


def test_a_control_vector_acts_on_the_outputs_of_its_layers(
    tokenizer: Any, tiny: tuple[Any, Path], folder: Path
) -> None:
    """Two layers with vectors of their own: a shift of the numbering by one would change the outputs."""
    model, base = tiny
    shifts = {layer: sealign.AffineEdit.constant(torch.randn(48)) for layer in (1, 3)}
    edit = edit_of(model, tokenizer, shifts, site="residual", strength=0.7)
    edit.save_pretrained(folder / "shifts")
    export_control_vector(edit, folder / "vector.gguf")
    moved = edit_of(model, tokenizer, {1: shifts[1], 2: shifts[3]}, site="residual", strength=0.7)
    export_control_vector(moved, folder / "moved.gguf")
    options = ("--model", str(folder / "tiny"), "--base", str(base))
    code, agreement = verify(folder / "shifts", folder / "vector.gguf", *options)
    assert code == 0, agreement
    assert agreement["largest"] < 1e-4
    assert agreement["effect"] > 1e-2
    assert agreement["share"] == pytest.approx(1.0, abs=1e-4)
    code, agreement = verify(folder / "shifts", folder / "moved.gguf", *options)
    assert code == 1, agreement


def test_a_control_vector_of_a_mean_difference(smollm2: Any, wide_base: Path, folder: Path) -> None:
    model, tokenizer = smollm2
    demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=12)
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=sealign.MeanDifferenceConfig(strength=3.0))
    edit.save_pretrained(folder / "mean_difference")
    export_control_vector(edit, folder / "mean_difference.gguf")
    vector = folder / "mean_difference.gguf"
    code, agreement = verify(folder / "mean_difference", vector, "--base", str(wide_base))
    assert code == 0, agreement
    assert agreement["share"] == pytest.approx(1.0, abs=0.01)
    assert agreement["same_tokens"] == 1.0


@pytest.mark.parametrize("kind", ["LoRA", "control vector"])
def test_without_its_base_a_file_is_refused(tokenizer: Any, tiny: tuple[Any, Path], folder: Path, kind: str) -> None:
    model, base = tiny
    site: Any = "mlp" if kind == "LoRA" else "residual"
    layer_edit = affine(48) if kind == "LoRA" else sealign.AffineEdit.constant(torch.ones(48))
    edit = edit_of(model, tokenizer, {1: layer_edit}, site=site)
    edit.save_pretrained(folder / "alone")
    if kind == "LoRA":
        export_gguf_lora(model, base, edit, folder / "alone.gguf")
    else:
        export_control_vector(edit, folder / "alone.gguf")
    result = run_verify(folder / "alone", folder / "alone.gguf", "--model", str(folder / "tiny"))
    assert result.returncode == 2
    assert f"is a {kind}, which needs its base model; name the GGUF file of that with --base" in result.stderr


def test_a_control_vector_of_another_width(
    tokenizer: Any, tiny: tuple[Any, Path], wide_base: Path, folder: Path
) -> None:
    model, _ = tiny
    edit = edit_of(model, tokenizer, {1: sealign.AffineEdit.constant(torch.ones(48))}, site="residual")
    edit.save_pretrained(folder / "narrow")
    export_control_vector(edit, folder / "narrow_vector.gguf")
    options = ("--model", str(folder / "tiny"), "--base", str(wide_base))
    result = run_verify(folder / "narrow", folder / "narrow_vector.gguf", *options)
    assert result.returncode == 2
    assert "the control vector has 48 features, but the model has 576" in result.stderr


@pytest.mark.usefixtures("edit")
def test_a_missing_file_is_refused(folder: Path) -> None:
    result = run_verify(folder / "edit", folder / "gone.gguf")
    assert result.returncode == 2
    assert "there is no file" in result.stderr
