"""Text decoders of vision-language checkpoints, whose names on disk differ from those in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import sealign
from sealign.export.lora import export_lora
from sealign.export.merged import export_merged
from sealign.models.loading import open_checkpoint
from tests.export.made_edits import random_edit
from tests.tiny_models import _GATED, logits

peft = pytest.importorskip("peft")

TEXT: dict[str, Any] = _GATED | {"vocab_size": 400, "head_dim": 12}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
QWEN_VISION = {"depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 48}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}

MODELS: dict[str, dict[str, Any]] = {
    "Gemma3": {
        "text_config": TEXT | {"model_type": "gemma3_text", "sliding_window": 16},
        "vision_config": VISION | {"model_type": "siglip_vision_model", "num_hidden_layers": 4},
        "mm_tokens_per_image": 4,
        "image_token_index": 399,
    },
    "Mistral3": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": VISION | {"model_type": "pixtral", "num_hidden_layers": 4},
        "image_token_index": 399,
    },
    "Qwen2_5_VL": {
        "text_config": TEXT | {"rope_parameters": ROPE | {"mrope_section": [2, 2, 2]}},
        "vision_config": QWEN_VISION | {"patch_size": 14},
        "image_token_id": 399,
        "video_token_id": 398,
    },
    "Qwen3_5": {
        "text_config": TEXT
        | {"layer_types": ["full_attention"] * 4, "head_dim": 16}
        | {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}},
        "vision_config": QWEN_VISION | {"patch_size": 14},
        "image_token_id": 399,
        "video_token_id": 398,
    },
}
"""Settings by the beginning of the names of configuration and model; vision and text have as many layers."""


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tokenizer: Any, tmp_path: Path) -> Path:
    """A checkpoint as transformers writes it, with the names of the original ones."""
    name = request.param
    torch.manual_seed(2)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.15)
    model.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / name)
    return tmp_path / name


def test_exports_are_the_hooks(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = sealign.load_model(str(folder), dtype="float32", device="cpu")
    edit = random_edit(model, tokenizer)
    base = logits(model, tokenizer)
    with sealign.apply_edit(model, edit):
        expected = logits(model, tokenizer)
    assert float((expected - base).abs().max()) > 1e-2
    export_merged(folder, edit, tmp_path / "merged")
    merged, _ = sealign.load_model(str(tmp_path / "merged"), dtype="float32", device="cpu")
    torch.testing.assert_close(logits(merged, tokenizer), expected, atol=2e-4, rtol=1e-4)
    opened = open_checkpoint(str(folder))
    assert opened is not None
    paths = export_lora(opened[0], edit, tmp_path / "adapter", checkpoint=opened[1])
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(adapted, tokenizer), expected, atol=2e-4, rtol=1e-4)
    assert [
        name.removeprefix("base_model.model.") for name, m in adapted.named_modules() if hasattr(m, "lora_A")
    ] == paths


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model."])
def test_names_in_gguf_files(prefix: str, tmp_path: Path) -> None:
    """llama.cpp's converter leaves ``language_model.`` out."""
    gguf = pytest.importorskip("gguf")
    from sealign.export.gguf_file import file_names, open_gguf

    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "gemma3")
    writer.add_tensor("blk.2.ffn_down.weight", torch.zeros(2, 3).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        transformers.Gemma3TextConfig(**TEXT)
    )
    name = f"{prefix}layers.2.mlp.down_proj.weight"
    assert file_names(open_gguf(tmp_path / "base.gguf"), model, [name]) == {name: "blk.2.ffn_down.weight"}
