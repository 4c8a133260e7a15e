"""LoRA adapters: PEFT's own loading as oracle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sealign
from sealign.errors import EditFileError, ExportError, FingerprintError
from sealign.export.lora import export_lora
from sealign.models.checkpoint_tensors import checkpoint_tensors
from tests.export.made_edits import affine, edit_of, random_edit
from tests.tiny_models import build_model, logits

peft = pytest.importorskip("peft")

DENSE = ["llama", "qwen2", "gemma2", "gemma3", "phi3", "olmo2", "granite", "smollm3", "mistral"]


def _check(model: Any, tokenizer: Any, edit: sealign.Edit, folder: Path) -> Any:
    """Load the adapter and compare it with the hooks; return the adapted model."""
    base = logits(model, tokenizer)
    with sealign.apply_edit(model, edit):
        expected = logits(model, tokenizer)
    assert float((expected - base).abs().max()) > 1e-2
    adapted = peft.PeftModel.from_pretrained(model, folder).eval()
    torch.testing.assert_close(logits(adapted, tokenizer), expected, atol=2e-4, rtol=1e-4)
    return adapted


def _touched(adapted: Any) -> list[str]:
    return [n.removeprefix("base_model.model.") for n, m in adapted.named_modules() if hasattr(m, "lora_A")]


@pytest.mark.parametrize("site", ["mlp", "attention"])
@pytest.mark.parametrize("name", DENSE)
def test_peft_computes_what_the_hooks_compute(tokenizer: Any, tmp_path: Path, name: str, site: Any) -> None:
    model = build_model(name, vocab_size=len(tokenizer))
    edit = random_edit(model, tokenizer, site=site)
    paths = export_lora(model, edit, tmp_path / "adapter")
    with sealign.apply_edit(model, edit):
        expected = logits(model, tokenizer)
    adapted = _check(model, tokenizer, edit, tmp_path / "adapter")
    assert _touched(adapted) == paths
    torch.testing.assert_close(logits(adapted.merge_and_unload(), tokenizer), expected, atol=2e-4, rtol=1e-4)


def test_a_fitted_edit(tokenizer: Any, demonstrations: Any, tmp_path: Path) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    config = sealign.SEAConfig(layers=(1, 3), normalization="none", batch_size=4, explained_variance=(0.9, 0.99))
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=config).with_strength(0.6)
    export_lora(model, edit, tmp_path / "adapter")
    _check(model, tokenizer, edit, tmp_path / "adapter")


def test_one_rank_for_all_layers_and_the_record(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    edit = edit_of(llama, tokenizer, {1: affine(48, rank=2), 3: affine(48, rank=5)})
    export_lora(llama, edit, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 5
    assert sorted(config["target_modules"]) == ["model.layers.1.mlp.down_proj", "model.layers.3.mlp.down_proj"]
    assert config["layers_to_transform"] is None
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tuple(t.shape) for n, t in tensors.items() if "lora_A" in n} == {(5, 80)}
    assert {tuple(t.shape) for n, t in tensors.items() if "lora_B" in n} == {(48, 5)}
    card = (tmp_path / "adapter" / "README.md").read_text()
    for text in (edit.hash, edit.record.demonstrations_hash, "computes what the edit computes", "layers: 1, 3"):
        assert text is not None
        assert text in card
    assert {entry.name for entry in (tmp_path / "adapter").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "sealign.json",
    }  # fmt: skip


def test_names_that_several_modules_share(tokenizer: Any, tmp_path: Path) -> None:
    """Names of Falcon's and other models' modules end alike in attention and feed-forward blocks."""
    model = build_model("falcon", vocab_size=len(tokenizer))
    paths = export_lora(model, random_edit(model, tokenizer, site="attention"), tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    assert _touched(adapted) == paths


def test_names_without_a_common_end(tokenizer: Any, tmp_path: Path) -> None:
    """Matrices of two kinds have no common name; then the adapter names each by its whole path."""
    model = build_model("llama", vocab_size=len(tokenizer))
    edit = edit_of(model, tokenizer, {1: affine(48)})
    other = edit_of(model, tokenizer, {3: affine(48)}, site="attention")
    layers = {**edit.record.layers, **other.record.layers}
    mixed = sealign.Edit({**edit.layer_edits, **other.layer_edits}, dataclasses.replace(edit.record, layers=layers))
    paths = export_lora(model, mixed, tmp_path / "adapter")
    assert paths == ["model.layers.1.mlp.down_proj", "model.layers.3.self_attn.o_proj"]
    assert sorted(_touched(_check(model, tokenizer, mixed, tmp_path / "adapter"))) == paths


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_are_combined_by_peft(tokenizer: Any, tmp_path: Path, name: str) -> None:
    """Two edits of other layers, sites and ranks, joined into one adapter, are both edits."""
    model = build_model(name, vocab_size=len(tokenizer))
    edits = {
        "first": edit_of(model, tokenizer, {1: affine(48, rank=2), 3: affine(48, rank=3)}, strength=0.4),
        "second": edit_of(model, tokenizer, {0: affine(48, rank=4, seed=5)}, site="attention"),
        "third": edit_of(model, tokenizer, {2: affine(48, rank=1, seed=6), 3: affine(48, seed=7)}),
    }
    for key, edit in edits.items():
        export_lora(model, edit, tmp_path / key)
    with sealign.apply_edit(model, edits["first"]):
        alone = logits(model, tokenizer)
    # Both edit layer 3, where adapters add up while edits apply one after another.
    both = {key: edits[key] for key in ("first", "second")}
    with sealign.apply_edit(model, both["first"]), sealign.apply_edit(model, both["second"]):
        expected = logits(model, tokenizer)
    assert float((expected - alone).abs().max()) > 1e-2
    adapted: Any = peft.PeftModel.from_pretrained(model, tmp_path / "first", adapter_name="first")
    for key in ("second", "third"):
        adapted.load_adapter(tmp_path / key, adapter_name=key)
    adapted.add_weighted_adapter(list(both), [1.0, 1.0], adapter_name="cat", combination_type="cat")
    adapted.set_adapter("cat")
    torch.testing.assert_close(logits(adapted.eval(), tokenizer), expected, atol=2e-4, rtol=1e-4)
    adapted.add_weighted_adapter(["first", "third"], [1.0, 1.0], adapter_name="wide", combination_type="cat")
    adapted.set_adapter("wide")
    touched = {key.split(".lora_A")[0] for key, _ in adapted.named_parameters() if ".lora_A.wide" in key}
    assert len(touched) == 3


def test_an_approximation_leaves_out_the_rescaling_only(tokenizer: Any, tmp_path: Path) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    edit = random_edit(model, tokenizer, normalization="token")
    with pytest.raises(ExportError, match="rescaled per token"):
        export_lora(model, edit, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    export_lora(model, edit, tmp_path / "adapter", approximate=True)
    _check(model, tokenizer, edit.with_normalization("none"), tmp_path / "adapter")
    assert "so it approximates the edit" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (
            {"shift": True},
            "adds a constant vector to the output of 'model.layers.1.mlp.down_proj', .*has none; export a",
        ),
        ({"center": True}, "adds a constant vector"),
        ({"rank": 0, "shift": True}, "adds a constant vector"),
        ({"scale": 0.5}, "scales the whole output of 'model.layers.1.mlp.down_proj', .*; export a merged checkpoint"),
        ({"site": "residual"}, "residual stream"),
    ],
)
def test_what_a_lora_cannot_carry(llama: Any, tokenizer: Any, tmp_path: Path, parts: Any, words: str) -> None:
    with pytest.raises(ExportError, match=words):
        export_lora(llama, random_edit(llama, tokenizer, **parts), tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_at_strength_0_every_edit_is_an_empty_lora(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    edit = random_edit(llama, tokenizer, strength=0.0, shift=True, scale=0.5)
    export_lora(llama, edit, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name)


def test_a_bias_that_the_edit_would_change(tokenizer: Any, tmp_path: Path) -> None:
    model = build_model("gpt2", vocab_size=len(tokenizer))
    edit = random_edit(model, tokenizer)
    # The biases of the random tiny model are zero, which a linear edit does not change.
    export_lora(model, edit, tmp_path / "adapter")
    with torch.no_grad():
        model.transformer.h[3].mlp.c_proj.bias.add_(1.0)
    with pytest.raises(ExportError, match=r"the edit changes the bias of 'transformer.h.3.mlp.c_proj', which a LoRA"):
        export_lora(model, edit, tmp_path / "other")


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gpt2"])
def test_the_edited_matrices_are_read_from_the_checkpoint(tokenizer: Any, tmp_path: Path, name: str) -> None:
    """The same adapter as from the loaded model, to the byte, from no tensors but those of the edited modules."""
    model = build_model(name, vocab_size=len(tokenizer))
    edit = random_edit(model, tokenizer)
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(model.config).eval()  # type: ignore[no-untyped-call]
    checkpoint = checkpoint_tensors(tmp_path / "base", skeleton)
    edited = export_lora(model, edit, tmp_path / "loaded")
    inside = tuple(f"{path}." for path in edit.modules)
    kept = {key: stored for key, stored in checkpoint.tensors.items() if key.startswith(inside)}
    assert 0 < len(kept) < len(checkpoint.tensors) / 4
    only = dataclasses.replace(checkpoint, tensors=kept)
    export_lora(skeleton, edit, tmp_path / "read", checkpoint=only)
    read, loaded = tmp_path / "read", tmp_path / "loaded"
    assert (read / "adapter_model.safetensors").read_bytes() == (loaded / "adapter_model.safetensors").read_bytes()
    one, two = (json.loads((each / "adapter_config.json").read_text()) for each in (read, loaded))
    assert sorted(one.pop("target_modules")) == sorted(two.pop("target_modules")) == sorted(edited)
    assert one == two


def test_a_checkpoint_with_a_bias_that_the_edit_would_change(tokenizer: Any, tmp_path: Path) -> None:
    model = build_model("gpt2", vocab_size=len(tokenizer))
    with torch.no_grad():
        model.transformer.h[3].mlp.c_proj.bias.add_(1.0)
    model.save_pretrained(tmp_path / "base")
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(model.config).eval()  # type: ignore[no-untyped-call]
    checkpoint = checkpoint_tensors(tmp_path / "base", skeleton)
    with pytest.raises(ExportError, match=r"the edit changes the bias of 'transformer.h.3.mlp.c_proj', which a LoRA"):
        export_lora(skeleton, random_edit(model, tokenizer), tmp_path / "adapter", checkpoint=checkpoint)


def test_an_update_that_is_not_finite(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "base")
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(llama.config).eval()  # type: ignore[no-untyped-call]
    checkpoint, edit = checkpoint_tensors(tmp_path / "base", skeleton), random_edit(llama, tokenizer, strength=1e39)
    with pytest.raises(ExportError, match=r"'model.layers.1.mlp.down_proj' holds NaN or infinity in float32"):
        export_lora(skeleton, edit, tmp_path / "adapter", checkpoint=checkpoint)


def test_a_bias_where_the_edit_leaves_it_alone(tokenizer: Any, tmp_path: Path) -> None:
    """A bias is no obstacle if it has no component in the directions that the edit reads."""
    model = build_model("gpt2", vocab_size=len(tokenizer))
    with torch.no_grad():
        for layer in (1, 3):
            model.transformer.h[layer].mlp.c_proj.bias[0] = 1.0
    right = torch.zeros(1, 48)
    right[0, 5] = 1.0  # orthogonal to the bias
    edit = edit_of(model, tokenizer, {layer: sealign.AffineEdit(affine(48, rank=1).left, right) for layer in (1, 3)})
    export_lora(model, edit, tmp_path / "adapter")
    _check(model, tokenizer, edit, tmp_path / "adapter")


def test_transposed_weights(tokenizer: Any, tmp_path: Path) -> None:
    model = build_model("gpt2", vocab_size=len(tokenizer))
    edit = random_edit(model, tokenizer)
    export_lora(model, edit, tmp_path / "adapter")
    _check(model, tokenizer, edit, tmp_path / "adapter")


def test_another_model_or_another_folder(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    edit = random_edit(llama, tokenizer)
    other = build_model("llama", vocab_size=len(tokenizer), intermediate_size=96)
    with pytest.raises(FingerprintError):
        export_lora(other, edit, tmp_path / "adapter")
    export_lora(other, edit, tmp_path / "adapter", ignore_mismatch=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(EditFileError, match="has no sealign.json written by Sealign"):
        export_lora(llama, edit, tmp_path / "thesis")
