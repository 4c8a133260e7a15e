"""ITI: which heads are selected, and the shift of the attention output against a shift of the heads by hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import sealign
from sealign.demonstrations.demonstration import Demonstration
from sealign.edits.attach import apply_edit
from sealign.errors import DemonstrationError, SiteError
from sealign.methods.iti import head_shift, probe_accuracy
from sealign.methods.registry import fit_edit
from tests.methods.hook_oracle import check_against_hooks
from tests.tiny_models import build_model, logits

HEADS = 4


def heads_of(model: Any, tokenizer: Any, items: list[Demonstration]) -> tuple[Any, Any]:
    """Return the activations of all heads at the last token of positives and negatives, (n, layers, heads, h)."""
    found = sealign.collect_activations(model, tokenizer, items, site="heads")
    positive, negative = (
        np.stack([rows[layer].double().numpy().reshape(len(items), HEADS, -1) for layer in found.layers], axis=1)
        for rows in (found.positive, found.negative)
    )
    return positive, negative


def shifts_of(edit: Any, positive: Any, negative: Any, alpha: float) -> dict[int, torch.Tensor]:
    """Return the shift of the heads of each layer, (heads h,) float64, by the paper's formula."""
    shifts = np.zeros(positive.shape[1:])
    for entry in edit.settings["selected"]:
        own, other = (rows[:, entry["layer"], entry["head"]] for rows in (positive, negative))
        theta = own.mean(0) - other.mean(0)
        theta /= np.linalg.norm(theta)
        shifts[entry["layer"], entry["head"]] = alpha * np.concatenate([own @ theta, other @ theta]).std() * theta
    return {layer: torch.from_numpy(shifts[layer].reshape(-1)) for layer in edit.layers}


def test_selects_and_shifts_the_heads_that_know(
    fitted: Callable[[str], Any], llama: Any, tokenizer: Any, demonstrations: list[Demonstration]
) -> None:
    edit = fitted("iti")
    positive, negative = heads_of(llama, tokenizer, demonstrations)
    assert positive.shape == (7, 4, HEADS, 12)
    selected = [(entry["layer"], entry["head"]) for entry in edit.settings["selected"]]
    assert len(selected) == 3
    accuracy, _ = probe_accuracy(positive, negative, 0.2, 0)
    worst_in = min(accuracy[layer, head] for layer, head in selected)
    assert worst_in >= np.sort(accuracy.reshape(-1))[-3]
    for entry in edit.settings["selected"]:
        assert entry["accuracy"] == round(accuracy[entry["layer"], entry["head"]], 4)
    assert edit.layers == sorted({layer for layer, _ in selected})
    assert edit.modules == [f"model.layers.{layer}.self_attn" for layer in edit.layers]
    assert edit.rank == 0
    for layer, shift in shifts_of(edit, positive, negative, 5.0).items():
        weight = llama.model.layers[layer].self_attn.o_proj.weight.detach().double()
        torch.testing.assert_close(edit.affine_edits[layer].shift.double(), weight @ shift, atol=1e-6, rtol=1e-5)
        others = [head for head in range(HEADS) if (layer, head) not in selected]
        assert not shift.reshape(HEADS, 12)[others].any()


def test_it_is_a_bias_of_the_output_matrix(
    fitted: Callable[[str], Any], tokenizer: Any, demonstrations: list[Demonstration]
) -> None:
    """The authors bake it in so: an oracle that has no hook."""
    edit = fitted("iti")
    model = build_model("llama", vocab_size=len(tokenizer))
    positive, negative = heads_of(model, tokenizer, demonstrations)
    with apply_edit(model, edit):
        expected = logits(model, tokenizer)
    for layer, shift in shifts_of(edit, positive, negative, 5.0).items():
        matrix = model.model.layers[layer].self_attn.o_proj
        matrix.bias = torch.nn.Parameter(matrix.weight @ shift.float())
    assert torch.allclose(logits(model, tokenizer), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("strength", [1.0, -0.4])
def test_it_is_a_shift_of_the_heads(
    name: str, strength: float, tokenizer: Any, demonstrations: list[Demonstration]
) -> None:
    """In float64, against hooks on what the output matrix takes in: without a bias, and with one and a transposed
    weight, and where the heads are together wider than the model."""
    changes = {"head_dim": 20} if name == "qwen3" else {}
    model = build_model(name, vocab_size=len(tokenizer), **changes).double()
    if name == "gpt2":
        matrices = {index: block.attn.c_proj for index, block in enumerate(model.transformer.h)}
        with torch.no_grad():
            for matrix in matrices.values():
                matrix.bias.normal_()
        assert type(matrix).__name__ == "Conv1D"
    else:
        matrices = {index: block.self_attn.o_proj for index, block in enumerate(model.model.layers)}
    config = sealign.ITIConfig(heads=5, alpha=3.0, strength=strength)
    edit: Any = fit_edit(model, tokenizer, demonstrations, config=config)
    shifts = shifts_of(edit, *heads_of(model, tokenizer, demonstrations), 3.0)
    hooks = [
        matrices[layer].register_forward_pre_hook(lambda _, inputs, shift=shift: (inputs[0] + strength * shift,))
        for layer, shift in shifts.items()
    ]
    check_against_hooks(model, tokenizer, edit, hooks, least=0.05, tolerance=1e-6)


def test_a_large_bias_does_not_round_the_shift_away(tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    """In bfloat16 the difference of two outputs near 1000 has no digit left."""
    model = build_model("gpt2", vocab_size=len(tokenizer)).bfloat16()
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_proj.bias.fill_(1000.0)
    edit: Any = fit_edit(model, tokenizer, demonstrations, config=sealign.ITIConfig(heads=2, alpha=1.0))
    for layer, shift in shifts_of(edit, *heads_of(model, tokenizer, demonstrations), 1.0).items():
        expected = model.transformer.h[layer].attn.c_proj.weight.detach().double().T @ shift
        torch.testing.assert_close(edit.affine_edits[layer].shift.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_relative_change_is_that_of_the_attention_output(
    fitted: Callable[[str], Any], llama: Any, tokenizer: Any, demonstrations: list[Demonstration]
) -> None:
    edit = fitted("iti")
    rows = sealign.collect_activations(llama, tokenizer, demonstrations, site="attention").neutral
    for layer, found in edit.affine_edits.items():
        change = (found.shift.norm() / rows[layer].norm(dim=1)).mean()
        assert edit.record.layers[str(layer)].relative_change == pytest.approx(float(change), rel=1e-4)


def test_it_can_take_the_probes_direction(llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    config = sealign.ITIConfig(heads=1, direction="probe", alpha=2.0)
    edit: Any = fit_edit(llama, tokenizer, demonstrations, config=config)
    positive, negative = heads_of(llama, tokenizer, demonstrations)
    _, weights = probe_accuracy(positive, negative, 0.2, 0)
    (entry,) = edit.settings["selected"]
    layer, head = entry["layer"], entry["head"]
    shift = np.zeros((HEADS, 12))
    shift[head] = 2.0 * head_shift(positive[:, layer, head], negative[:, layer, head], weights[layer, head])
    weight = llama.model.layers[layer].self_attn.o_proj.weight.detach().double()
    expected = weight @ torch.from_numpy(shift.reshape(-1))
    torch.testing.assert_close(edit.affine_edits[layer].shift.double(), expected, atol=1e-6, rtol=1e-5)


def test_heads_of_chosen_layers_only(llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    for layers, allowed in (([1, 3], {1, 3}), ("last:1", {3}), ("signature:2", None)):
        edit: Any = fit_edit(llama, tokenizer, demonstrations, config=sealign.ITIConfig(heads=4, layers=layers))
        assert len(edit.settings["selected"]) == 4
        assert allowed is None or set(edit.layers) <= allowed
        assert len(edit.layers) <= 2


def test_a_module_pattern_names_the_attention_modules(
    llama: Any, tokenizer: Any, demonstrations: list[Demonstration]
) -> None:
    """The pattern decides where heads are read and where their shift is added."""
    found: Any = fit_edit(llama, tokenizer, demonstrations, config=sealign.ITIConfig(heads=2))
    config = sealign.ITIConfig(heads=2, module_pattern="model.layers.{layer}.self_attn.o_proj")
    named: Any = fit_edit(llama, tokenizer, demonstrations, config=config)
    assert named.modules == [f"{module}.o_proj" for module in found.modules]
    for layer, layer_edit in found.affine_edits.items():
        torch.testing.assert_close(named.affine_edits[layer].shift, layer_edit.shift)
    with pytest.raises(SiteError, match="no module 'model.layers.0.attn'"):
        fit_edit(llama, tokenizer, demonstrations, config=sealign.ITIConfig(module_pattern="model.layers.{layer}.attn"))


def test_the_number_of_heads(llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    calls: list[int] = []
    hook = llama.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(SiteError, match="heads is 17, but layers 'all' have 16 heads; choose at most as many"):
        fit_edit(llama, tokenizer, demonstrations, config=sealign.ITIConfig(heads=17))
    with pytest.raises(SiteError, match="heads is 5, but layers '3' have 4 heads"):
        fit_edit(llama, tokenizer, demonstrations, config=sealign.ITIConfig(heads=5, layers="3"))
    with pytest.raises(SiteError, match="heads is 9, but layers 'signature:2' have 8 heads"):
        fit_edit(llama, tokenizer, demonstrations, config=sealign.ITIConfig(heads=9, layers="signature:2"))
    hook.remove()
    assert calls == []
    whole = fit_edit(llama, tokenizer, demonstrations, config=sealign.ITIConfig(heads=16))
    assert len(whole.settings["selected"]) == 16
    # 48 of the 1024 heads of Llama 7B are 0.75 of 16, and 1.5 of 32, which rounds to the even 2.
    deep = build_model("llama", vocab_size=len(tokenizer), num_hidden_layers=8)
    for model, count in ((llama, 1), (deep, 2)):
        default = fit_edit(model, tokenizer, demonstrations, config=sealign.ITIConfig())
        assert len(default.settings["selected"]) == count


def test_too_few_to_hold_some_out(llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    with pytest.raises(DemonstrationError, match="ITI needs at least 3"):
        fit_edit(llama, tokenizer, demonstrations[:2], config=sealign.ITIConfig(heads=1))
    assert fit_edit(llama, tokenizer, demonstrations[:3], config=sealign.ITIConfig(heads=1)).layers


def test_a_head_without_a_direction_is_not_shifted() -> None:
    same = np.ones((3, 4))
    assert not head_shift(same, same).any()
    assert not head_shift(same, 2 * same, np.zeros(4)).any()
