"""Merged checkpoints: what transformers loads from them as oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sealign
from sealign.errors import ExportError, FingerprintError
from sealign.export.merged import export_merged
from sealign.models.checkpoint_tensors import CheckpointTensors
from tests.export.made_edits import random_edit
from tests.tiny_models import build_model, logits

NAMES = [
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "olmo2",
    "gpt2",
    "gpt_neox",
    "opt",
    "falcon",
    "starcoder2",
]


def _save(model: Any, tokenizer: Any, folder: Path, **kwargs: Any) -> Path:
    model.save_pretrained(folder, **kwargs)
    tokenizer.save_pretrained(folder)
    return folder


def _with_biases(model: Any) -> Any:
    """Give a model biases that are not zero, where it has any."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model


def _check(model: Any, edit: Any, tokenizer: Any, merged: Path, *, tolerance: float = 2e-4) -> Any:
    """Load the checkpoint in its own type and compare it with the hooks; return the loaded model."""
    from transformers import AutoModelForCausalLM

    with sealign.apply_edit(model, edit):
        expected = logits(model, tokenizer)
    assert float((expected - logits(model, tokenizer)).abs().max()) > 1e-3
    pair: Any = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    loaded, report = pair
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.dtype == model.dtype
    torch.testing.assert_close(logits(loaded.eval(), tokenizer), expected, atol=tolerance, rtol=min(tolerance, 1e-4))
    return loaded


@pytest.mark.parametrize("scale", [0.0, 0.4])
@pytest.mark.parametrize("name", NAMES)
def test_a_reload_computes_what_the_hooks_compute(tokenizer: Any, tmp_path: Path, name: str, scale: float) -> None:
    model = _with_biases(build_model(name, vocab_size=len(tokenizer)))
    edit = random_edit(model, tokenizer, scale=scale)
    source = _save(model, tokenizer, tmp_path / "base")
    before = {entry.name: entry.read_bytes() for entry in source.iterdir()}
    changed = export_merged(source, edit, tmp_path / "merged")
    assert len([key for key in changed if key.endswith("weight")]) == 2
    _check(model, edit, tokenizer, tmp_path / "merged")
    assert {entry.name: entry.read_bytes() for entry in source.iterdir()} == before
    old, new = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "merged"))
    assert {key for key in old if not torch.equal(old[key], new[key])} == set(changed)


@pytest.mark.parametrize("site", ["mlp", "attention"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_part_of_an_edit_in_float64(tokenizer: Any, tmp_path: Path, name: str, site: Any) -> None:
    """GPT-2's matrices have biases; Llama's get them by a switch of its configuration."""
    model = _with_biases(build_model(name, vocab_size=len(tokenizer)).double())
    edit = random_edit(model, tokenizer, site=site, scale=0.3, shift=True, center=True)
    export_merged(_save(model, tokenizer, tmp_path / "base"), edit, tmp_path / "merged")
    # Llama's norms round to float32 inside, so that a difference of 1e-16 may become one of 1e-7.
    _check(model, edit, tokenizer, tmp_path / "merged", tolerance=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "config",
    [
        sealign.MeanDifferenceConfig(site="mlp", layers=(1, 3), strength=2.0, batch_size=4),
        sealign.MeanDifferenceConfig(site="attention", layers=(1, 3), strength=-1.5, batch_size=4),
        sealign.ITIConfig(heads=3, alpha=5.0, strength=0.5, batch_size=4),
        sealign.LEACEConfig(site="mlp", layers=(1, 3), strength=0.7, batch_size=4),
        sealign.SEAConfig(centered=True, rank=(3, 2), layers=(1, 3), normalization="none", batch_size=4),
        sealign.SEAConfig(combine="positive", rank=3, layers=(1, 3), site="attention", normalization="none"),
    ],
    ids=["mean_difference-mlp", "mean_difference-attention", "iti", "leace", "sea-centered", "sea-positive"],
)
def test_edits_of_every_affine_method(
    tokenizer: Any, demonstrations: Any, tmp_path: Path, name: str, config: Any
) -> None:
    model = _with_biases(build_model(name, vocab_size=len(tokenizer)))
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=config)
    changed = export_merged(_save(model, tokenizer, tmp_path / "base"), edit, tmp_path / "merged")
    if edit.rank == 0:  # a pure shift leaves the weights alone
        assert all(key.endswith("bias") for key in changed)
    _check(model, edit, tokenizer, tmp_path / "merged")


def test_what_is_not_the_hooks_is_not_written(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change in the weight of another layer, as after a mistake in a name."""
    model = build_model("llama", vocab_size=len(tokenizer))
    source, edit = _save(model, tokenizer, tmp_path / "base"), random_edit(model, tokenizer)
    find = CheckpointTensors.find
    monkeypatch.setattr(CheckpointTensors, "find", lambda self, name: find(self, name.replace("layers.3", "layers.2")))
    with pytest.raises(ExportError, match=r"the merged checkpoint changes the output of 'model.layers.3.mlp' by"):
        export_merged(source, edit, tmp_path / "merged")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize("site", ["mlp", "attention"])
def test_a_constant_part_switches_the_biases_on(tokenizer: Any, tmp_path: Path, site: Any) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    edit = random_edit(model, tokenizer, site=site, center=True)
    export_merged(_save(model, tokenizer, tmp_path / "base"), edit, tmp_path / "merged")
    loaded = _check(model, edit, tokenizer, tmp_path / "merged")
    assert getattr(loaded.config, f"{site}_bias") is True
    biases = {key: value for key, value in loaded.state_dict().items() if key.endswith("bias")}
    edited = [key for key, value in biases.items() if bool(value.abs().max() > 0)]
    assert len(edited) == 2
    assert len(biases) == 4 * (3 if site == "mlp" else 4)


def test_shards_stay_shards(tokenizer: Any, tmp_path: Path) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    edit = random_edit(model, tokenizer, shift=True)
    source = _save(model, tokenizer, tmp_path / "base", max_shard_size="100KB")
    names = {entry.name for entry in source.glob("*.safetensors")}
    assert len(names) > 2
    export_merged(source, edit, tmp_path / "merged")
    assert {entry.name for entry in (tmp_path / "merged").glob("*.safetensors")} == names
    _check(model, edit, tokenizer, tmp_path / "merged")
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    sizes = sum(t.numel() * t.element_size() for n in names for t in load_file(tmp_path / "merged" / n).values())
    assert index["metadata"]["total_size"] == sizes


def test_narrow_types_stay(tokenizer: Any, tmp_path: Path) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    edit = random_edit(model, tokenizer)
    source = _save(model.bfloat16(), tokenizer, tmp_path / "base")
    export_merged(source, edit, tmp_path / "merged", ignore_mismatch=False)
    old, new = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "merged"))
    name = "model.layers.3.mlp.down_proj.weight"
    assert new[name].dtype == torch.bfloat16
    left, right = edit.affine_edits[3].left.double(), edit.affine_edits[3].right.double()
    expected = old[name].double() + 0.6 * (left @ (right @ old[name].double()))
    assert torch.equal(new[name], expected.bfloat16())


def test_everything_else_is_carried(tokenizer: Any, tmp_path: Path) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    source = _save(model, tokenizer, tmp_path / "base")
    (source / "pytorch_model.bin").write_bytes(b"old weights")
    export_merged(source, random_edit(model, tokenizer), tmp_path / "merged")
    carried = {entry.name for entry in (tmp_path / "merged").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"} <= carried
    assert "pytorch_model.bin" not in carried
    loaded, again = sealign.load_model(str(tmp_path / "merged"))
    assert again.chat_template == tokenizer.chat_template
    assert loaded.config.num_hidden_layers == 4


def test_refusals(tokenizer: Any, tmp_path: Path) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    source = _save(model, tokenizer, tmp_path / "base")
    target = tmp_path / "merged"
    linear = random_edit(model, tokenizer)
    cases: list[tuple[Any, str]] = [
        (linear.with_normalization("token"), "rescaled per token"),
        (random_edit(model, tokenizer, site="residual"), "residual stream"),
        (random_edit(model, tokenizer, strength=1e30), "model.layers.1.mlp.down_proj.weight' holds NaN or infinity"),
    ]
    half = {key: value.half() for key, value in load_file(source / "model.safetensors").items()}
    narrow = tmp_path / "narrow"
    _save(model, tokenizer, narrow)
    save_file(half, narrow / "model.safetensors", metadata={"format": "pt"})
    for edit, words in cases:
        with pytest.raises(ExportError, match=words):
            export_merged(narrow, edit, target)
    empty = tmp_path / "empty"
    _save(model, tokenizer, empty)
    (empty / "model.safetensors").unlink()
    with pytest.raises(ExportError, match="has no safetensors weights"):
        export_merged(empty, linear, target)
    other = _save(build_model("llama", vocab_size=len(tokenizer), intermediate_size=96), tokenizer, tmp_path / "other")
    with pytest.raises(FingerprintError):
        export_merged(other, linear, target)
    assert not target.exists()
    assert not list(tmp_path.glob(".merged*"))


def test_no_bias_to_switch_on(tokenizer: Any, tmp_path: Path) -> None:
    model = build_model("qwen2", vocab_size=len(tokenizer))
    edit = random_edit(model, tokenizer, shift=True)
    with pytest.raises(
        ExportError,
        match=r"to the output of 'model.layers.1.mlp.down_proj', which needs a bias, .* one there; serve it with",
    ):
        export_merged(_save(model, tokenizer, tmp_path / "base"), edit, tmp_path / "merged")


def test_integers_are_not_merged(tokenizer: Any, tmp_path: Path) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    source = _save(model, tokenizer, tmp_path / "base")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="is stored as torch.int8, which a merge cannot change; export a LoRA"):
        export_merged(source, random_edit(model, tokenizer), tmp_path / "merged")
