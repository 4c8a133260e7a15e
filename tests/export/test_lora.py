"""LoRA adapters: PEFT's own loading as oracle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sealign
from sealign.errors import EditFileError, ExportError, FingerprintError
from sealign.export.lora import export_lora
from tests.tiny_models import build_model, logits

peft = pytest.importorskip("peft")

DENSE = ["llama", "qwen2", "gemma2", "gemma3", "phi3", "olmo2", "granite", "smollm3", "mistral"]


def _edit(model: Any, tokenizer: Any, demonstrations: Any, **settings: Any) -> sealign.Edit:
    chosen = {"layers": (1, 3), "normalization": "none", "batch_size": 4, "explained_variance": (0.9, 0.99)} | settings
    return sealign.fit_edit(model, tokenizer, demonstrations, config=sealign.FitConfig(**chosen))


@pytest.mark.parametrize("site", ["mlp", "attention"])
@pytest.mark.parametrize("name", DENSE)
def test_peft_computes_what_the_hooks_compute(
    tokenizer: Any, demonstrations: Any, tmp_path: Path, name: str, site: Any
) -> None:
    model = build_model(name, vocab_size=len(tokenizer))
    edit = _edit(model, tokenizer, demonstrations, site=site, strength=0.6)
    paths = export_lora(model, edit, tmp_path / "adapter")
    base = logits(model, tokenizer)
    with sealign.apply_edit(model, edit):
        expected = logits(model, tokenizer)
    assert float((expected - base).abs().max()) > 1e-2
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(adapted, tokenizer), expected, atol=2e-4, rtol=1e-4)
    touched = [n.removeprefix("base_model.model.") for n, m in adapted.named_modules() if hasattr(m, "lora_A")]
    assert touched == paths
    torch.testing.assert_close(logits(adapted.merge_and_unload(), tokenizer), expected, atol=2e-4, rtol=1e-4)


def test_one_rank_for_all_layers_and_the_record(
    llama: Any, tokenizer: Any, demonstrations: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    edit = _edit(llama, tokenizer, demonstrations)
    ranks = [p.rank_positive + p.rank_negative for p in edit.projections.values()]
    export_lora(llama, edit, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == max(ranks)
    assert config["target_modules"] == ["down_proj"]
    assert config["layers_to_transform"] == [1, 3]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tuple(t.shape) for n, t in tensors.items() if "lora_A" in n} == {(max(ranks), 80)}
    assert {tuple(t.shape) for n, t in tensors.items() if "lora_B" in n} == {(48, max(ranks))}
    card = (tmp_path / "adapter" / "README.md").read_text()
    for told in (edit.hash, edit.record.demonstrations_hash, "computes exactly", "layers: 1, 3"):
        assert told in card
    assert {entry.name for entry in (tmp_path / "adapter").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip


def test_names_that_several_modules_share(tokenizer: Any, demonstrations: Any, tmp_path: Path) -> None:
    """Phi-3's and others' names end alike in attention and feed-forward blocks."""
    model = build_model("falcon", vocab_size=len(tokenizer))
    edit = _edit(model, tokenizer, demonstrations, site="attention")
    paths = export_lora(model, edit, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    touched = [n.removeprefix("base_model.model.") for n, m in adapted.named_modules() if hasattr(m, "lora_A")]
    assert touched == paths


def test_an_approximation_leaves_out_the_rescaling_only(
    llama: Any, tokenizer: Any, demonstrations: Any, tmp_path: Path
) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    edit = _edit(model, tokenizer, demonstrations, normalization="token")
    with pytest.raises(ExportError, match="rescaled per token"):
        export_lora(model, edit, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    export_lora(model, edit, tmp_path / "adapter", approximate=True)
    with sealign.apply_edit(model, edit.with_settings(normalization="none")):
        expected = logits(model, tokenizer)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(adapted, tokenizer), expected, atol=2e-4, rtol=1e-4)
    assert "this is an approximation" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"centered": True}, "centred, which needs a bias that a LoRA does not have; export a merged checkpoint"),
        ({"combine": "positive"}, "'positive' also scales the whole activation"),
        ({"combine": "average"}, "'average' also scales the whole activation"),
        ({"feature_map": "elu"}, "feature map 'elu'"),
        ({"site": "residual"}, "residual stream"),
    ],
)
def test_what_a_lora_cannot_carry(
    llama: Any, tokenizer: Any, demonstrations: Any, tmp_path: Path, settings: Any, words: str
) -> None:
    edit = _edit(llama, tokenizer, demonstrations, **settings)
    with pytest.raises(ExportError, match=words):
        export_lora(llama, edit, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_bias_that_the_edit_would_change(tokenizer: Any, demonstrations: Any, tmp_path: Path) -> None:
    model = build_model("gpt2", vocab_size=len(tokenizer))
    edit = _edit(model, tokenizer, demonstrations)
    # The random tiny model's biases are zero, which nothing can change.
    export_lora(model, edit, tmp_path / "adapter")
    with torch.no_grad():
        model.transformer.h[3].mlp.c_proj.bias.add_(1.0)
    with pytest.raises(ExportError, match=r"'transformer.h.3.mlp.c_proj' has a bias, which the edit changes"):
        export_lora(model, edit, tmp_path / "other")


def test_transposed_weights(tokenizer: Any, demonstrations: Any, tmp_path: Path) -> None:
    model = build_model("gpt2", vocab_size=len(tokenizer))
    edit = _edit(model, tokenizer, demonstrations)
    export_lora(model, edit, tmp_path / "adapter")
    with sealign.apply_edit(model, edit):
        expected = logits(model, tokenizer)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(adapted, tokenizer), expected, atol=2e-4, rtol=1e-4)


def test_another_model_or_another_folder(
    llama: Any, tokenizer: Any, demonstrations: Any, small_edit: sealign.Edit, tmp_path: Path
) -> None:
    edit = _edit(llama, tokenizer, demonstrations)
    other = build_model("llama", vocab_size=len(tokenizer), intermediate_size=96)
    with pytest.raises(FingerprintError):
        export_lora(other, edit, tmp_path / "adapter")
    export_lora(other, edit, tmp_path / "adapter", ignore_mismatch=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(EditFileError, match="was not written by Sealign"):
        export_lora(llama, edit, tmp_path / "thesis")
    record = dataclasses.replace(edit.record, tensors_hash="")
    assert record.settings.normalization == "none"
