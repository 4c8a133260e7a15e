"""GGUF exports run by llama.cpp itself, through ``sealign verify`` in the environment of ``make vllm-env``."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import sealign
from sealign.export.gguf import export_gguf, export_gguf_lora
from sealign.models.embedded_model import embedded_file
from tests.edit_server import engine_command

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def edit(smollm2: Any, folder: Path) -> sealign.Edit:
    model, tokenizer = smollm2
    demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=12)
    config = sealign.FitConfig(layers="last:10", rank=(4, 9), normalization="none", combine="negative")
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


def verify(folder: Path, file: Path, *more: str) -> tuple[int, dict[str, Any]]:
    command = [engine_command("sealign"), "verify", "--edit", str(folder / "edit"), "--against", f"gguf={file}", *more]
    result = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=600)
    assert result.returncode in (0, 1), result.stderr
    (agreement,) = json.loads(result.stdout)
    return result.returncode, agreement


def test_a_lora_beside_float32_weights_equals_the_hooks(
    smollm2: Any, edit: sealign.Edit, wide_base: Path, folder: Path
) -> None:
    export_gguf_lora(smollm2[0], wide_base, edit, folder / "lora.gguf")
    code, agreement = verify(folder, folder / "lora.gguf", "--base", str(wide_base))
    assert code == 0, agreement
    assert agreement["share"] == pytest.approx(1.0, abs=0.01)
    assert agreement["same_tokens"] == 1.0


def test_float32_weights_with_the_edit_equal_the_hooks(
    smollm2: Any, edit: sealign.Edit, wide_base: Path, folder: Path
) -> None:
    export_gguf(smollm2[0], wide_base, edit, folder / "edited.gguf")
    code, agreement = verify(folder, folder / "edited.gguf")
    assert code == 0, agreement
    assert agreement["share"] == pytest.approx(1.0, abs=0.01)
    # The base file is a deployment in which the edit does nothing.
    code, agreement = verify(folder, wide_base)
    assert code == 1
    assert agreement["share"] == pytest.approx(0.0, abs=0.01)


def test_the_embedded_file_with_a_lora(smollm2: Any, edit: sealign.Edit, folder: Path) -> None:
    """In four bits llama.cpp rounds activations too, so its figures are near and not equal."""
    export_gguf_lora(smollm2[0], embedded_file(), edit, folder / "narrow.gguf")
    code, agreement = verify(folder, folder / "narrow.gguf", "--tolerance", "1.0")
    assert code == 0, agreement
    assert agreement["share"] == pytest.approx(1.0, abs=0.1)
    assert agreement["mean"] < 0.2 * agreement["effect"]


def test_a_lora_without_its_base_is_refused(smollm2: Any, edit: sealign.Edit, wide_base: Path, folder: Path) -> None:
    export_gguf_lora(smollm2[0], wide_base, edit, folder / "alone.gguf")
    command = [engine_command("sealign"), "verify", "--edit", str(folder / "edit"), "--against"]
    result = subprocess.run([*command, f"gguf={folder / 'gone.gguf'}"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "there is no file" in result.stderr
