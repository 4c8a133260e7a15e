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
from tests.export.made_edits import edit_of
from tests.export.tiny_gguf import write_llama
from tests.tiny_models import build_model

pytestmark = [pytest.mark.engines, pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("llama")]


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


def verify(edit: Path, files: list[Path], *more: str) -> list[dict[str, Any]]:
    """Run all files in one process, and return how each agrees with the hooks."""
    against = [word for file in files for word in ("--against", f"gguf={file}")]
    command = [engine_command("sealign"), "verify", "--edit", str(edit), *against, *more, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert result.returncode in (0, 1), result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)
    assert (result.returncode == 0) == all(agreement["passed"] for agreement in found)
    return found


def test_float32_weights_with_and_beside_the_edit_equal_the_hooks(
    smollm2: Any, edit: sealign.Edit, wide_base: Path, folder: Path
) -> None:
    export_gguf_lora(smollm2[0], wide_base, edit, folder / "lora.gguf")
    export_gguf(smollm2[0], wide_base, edit, folder / "edited.gguf")
    files = [folder / "lora.gguf", folder / "edited.gguf", wide_base]
    lora, edited, base = verify(folder / "edit", files, "--base", str(wide_base))
    for agreement in (lora, edited):
        assert agreement["passed"], agreement
        assert agreement["applied"] == pytest.approx(1.0, abs=0.01)
    assert lora["same_tokens"] == 1.0
    # The base file is a deployment in which the edit does nothing.
    assert not base["passed"]
    assert base["applied"] == pytest.approx(0.0, abs=0.01)


def test_the_embedded_file_with_a_lora(smollm2: Any, edit: sealign.Edit, folder: Path) -> None:
    """In four bits llama.cpp rounds activations too, so its outputs are near and not equal."""
    export_gguf_lora(smollm2[0], embedded_file(), edit, folder / "narrow.gguf")
    (agreement,) = verify(folder / "edit", [folder / "narrow.gguf"], "--tolerance", "1.0")
    assert agreement["passed"], agreement
    assert agreement["applied"] == pytest.approx(1.0, abs=0.1)
    assert agreement["mean"] < 0.2 * agreement["effect"]


def test_a_control_vector_of_a_mean_difference(smollm2: Any, wide_base: Path, folder: Path) -> None:
    model, tokenizer = smollm2
    demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=12)
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=sealign.MeanDifferenceConfig(strength=3.0))
    edit.save_pretrained(folder / "mean_difference")
    export_control_vector(edit, folder / "mean_difference.gguf")
    files = [folder / "mean_difference.gguf"]
    (agreement,) = verify(folder / "mean_difference", files, "--base", str(wide_base))
    assert agreement["passed"], agreement
    assert agreement["applied"] == pytest.approx(1.0, abs=0.01)
    assert agreement["same_tokens"] == 1.0


def test_a_control_vector_acts_on_the_outputs_of_its_layers(tokenizer: Any, folder: Path) -> None:
    """Two layers with vectors of their own: another numbering would change the outputs."""
    model = build_model("llama", vocab_size=len(tokenizer))
    model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    base = write_llama(model, folder / "tiny.gguf")
    shifts = {layer: sealign.AffineEdit.constant(torch.randn(48)) for layer in (1, 3)}
    edit = edit_of(model, tokenizer, shifts, site="residual", strength=0.7)
    edit.save_pretrained(folder / "shifts")
    export_control_vector(edit, folder / "vector.gguf")
    moved = edit_of(model, tokenizer, {1: shifts[1], 2: shifts[3]}, site="residual", strength=0.7)
    export_control_vector(moved, folder / "moved.gguf")
    files, options = [folder / "vector.gguf", folder / "moved.gguf"], ("--model", str(folder / "tiny"))
    right, wrong = verify(folder / "shifts", files, *options, "--base", str(base))
    assert right["passed"], right
    assert right["largest"] < 1e-4
    assert right["effect"] > 1e-2
    assert right["applied"] == pytest.approx(1.0, abs=1e-4)
    assert not wrong["passed"], wrong
