"""The check of exports without the model in memory: what the structure of a model cannot show."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from sealign.errors import ExportError
from sealign.export.lora import export_lora, lora_factors
from sealign.export.matrix_changes import MatrixChange
from sealign.export.merged import export_merged
from sealign.export.module_check import check_lora
from sealign.models.checkpoint_tensors import CheckpointTensors, checkpoint_tensors
from tests.export.made_edits import random_edit
from tests.tiny_models import build_model

BOTH = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "gpt2", "gpt_neox", "opt", "falcon"]
BOTH += ["starcoder2", "granite", "gpt_neo", "gptj", "ctrl", "xglm", "cohere", "glm4", "qwen3_5_text", "gemma3n_text"]
BOTH += ["gemma4_text"]
MLP = [*BOTH, "lfm2", "granite4_dense", "recurrent_gemma"]
ATTENTION = [*BOTH, "mixtral", "qwen3_moe", "deepseek_v3", "mpt", "llama4_text", "gpt_oss", "granitemoeshared"]
ATTENTION += ["qwen3_next", "falcon_h1", "rwkv"]


def _stored(model: Any, folder: Path) -> tuple[Any, CheckpointTensors]:
    """Return a model without weights, and the tensors of its checkpoint."""
    model.save_pretrained(folder, max_shard_size="100KB")
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype).eval()  # type: ignore[no-untyped-call]
    return skeleton, checkpoint_tensors(folder, skeleton)


@pytest.mark.parametrize(
    ("name", "site"), [(name, "mlp") for name in MLP] + [(name, "attention") for name in ATTENTION]
)
def test_the_right_factors_pass_and_others_do_not(tokenizer: Any, tmp_path: Path, name: str, site: Any) -> None:
    model = build_model(name, vocab_size=len(tokenizer))
    layers = [3] if name in ("qwen3_next", "qwen3_5_text", "gpt_neo") else [1, 3]
    edit = random_edit(model, tokenizer, site=site, layers=layers)
    skeleton, checkpoint = _stored(model, tmp_path / "base")
    factors = list(lora_factors(skeleton, edit, checkpoint=checkpoint, ignore_mismatch=True).values())
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    for part, factor in [("b", 1.05), ("a", -1.0), ("b", 0.0)]:
        wrong = dataclasses.replace(factors[-1], **{part: factor * getattr(factors[-1], part)})
        with pytest.raises(ExportError, match=r"the LoRA adapter changes the output of '.*3\..*' by"):
            check_lora(skeleton, edit, [*factors[:-1], wrong], checkpoint)


def _shifted_past_the_count(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
    """Return the output of the matrix after a change that torch does not count."""
    found = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    found.data.add_(0.5)
    return found


class _InOut(torch.nn.Linear):
    """A matrix whose weight has shape (in, out), under a name that does not tell."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class _Scaled(torch.nn.Linear):
    """A matrix that is stored apart from its size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 3.0


def test_an_architecture_of_which_the_structure_says_yes(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    edit = random_edit(model, tokenizer)
    monkeypatch.setattr(LlamaMLP, "forward", _shifted_past_the_count)
    skeleton, checkpoint = _stored(model, tmp_path / "base")
    with pytest.raises(ExportError, match=r"adapter changes the output of 'model.layers.1.mlp' by .* another edit"):
        export_lora(skeleton, edit, tmp_path / "lora", checkpoint=checkpoint)
    with pytest.raises(ExportError, match=r"merged checkpoint changes the output of 'model.layers.1.mlp' by"):
        export_merged(tmp_path / "base", edit, tmp_path / "merged")
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("kind", [_InOut, _Scaled])
def test_a_matrix_of_another_kind_than_its_name_says(tokenizer: Any, tmp_path: Path, kind: type) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    skeleton, checkpoint = _stored(model, tmp_path / "base")
    for layer in skeleton.model.layers:
        layer.self_attn.o_proj.__class__ = kind
    with pytest.raises(ExportError, match=r"the LoRA adapter changes the output of 'model.layers.1.self_attn' by"):
        export_lora(skeleton, random_edit(model, tokenizer, site="attention"), tmp_path / "lora", checkpoint=checkpoint)
    assert not (tmp_path / "lora").exists()


def test_a_checkpoint_whose_names_mislead(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of another layer, of the same shape."""
    model = build_model("llama", vocab_size=len(tokenizer))
    skeleton, checkpoint = _stored(model, tmp_path / "base")
    find = CheckpointTensors.find
    monkeypatch.setattr(CheckpointTensors, "find", lambda self, name: find(self, name.replace("layers.3", "layers.2")))
    with pytest.raises(ExportError, match=r"the LoRA adapter changes the output of 'model.layers.3.mlp' by"):
        export_lora(skeleton, random_edit(model, tokenizer), tmp_path / "lora", checkpoint=checkpoint)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rounding_is_allowed_for_and_no_change_is_not(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    """At 3 % of the edit, too, which moves logits by less than their own precision in bfloat16."""
    model = build_model(name, vocab_size=len(tokenizer)).to(dtype)
    model.save_pretrained(tmp_path / "base")
    for scale in (0.0, 0.5):
        edit = random_edit(model, tokenizer, strength=0.03, scale=scale)
        export_merged(tmp_path / "base", edit, tmp_path / f"merged-{scale}")
    monkeypatch.setattr(MatrixChange, "new_weight", lambda _self, weight: weight)
    with pytest.raises(ExportError, match="the merged checkpoint changes the output of"):
        export_merged(tmp_path / "base", edit, tmp_path / "unchanged")
    assert not (tmp_path / "unchanged").exists()


def test_an_edit_of_strength_0_is_no_change(tokenizer: Any, tmp_path: Path) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    skeleton, checkpoint = _stored(model, tmp_path / "base")
    edit = random_edit(model, tokenizer, strength=0.0)
    assert export_lora(skeleton, edit, tmp_path / "lora", checkpoint=checkpoint)
    assert export_merged(tmp_path / "base", edit, tmp_path / "merged") == []
