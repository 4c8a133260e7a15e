"""LEACE against the eraser of concept-erasure, applied by hooks of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from concept_erasure import LeaceFitter

import sealign
from sealign.demonstrations.demonstration import Demonstration
from sealign.edits.attach import apply_edit
from sealign.errors import SettingError
from sealign.methods.registry import fit_edit, fit_edit_from_activations
from tests.conftest import our_hooks
from tests.methods.hook_oracle import check_against_hooks, remove
from tests.methods.residuals import residuals
from tests.tiny_models import build_model, logits


def test_it_leaves_no_linear_trace(llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    """At each layer on what the earlier ones left, also where a later eraser is fitted."""
    edit = fit_edit(llama, tokenizer, demonstrations, config=sealign.LEACEConfig(layers="0,2"))
    for layer in (0, 2):
        with apply_edit(llama, edit):
            positive, negative = residuals(llama, tokenizer, demonstrations, layer)
        clean = residuals(llama, tokenizer, demonstrations, layer)
        gaps = [np.linalg.norm(first.mean(0) - second.mean(0)) for first, second in (clean, (positive, negative))]
        assert gaps[1] < 0.2 * gaps[0]  # the rest is the shrinkage of so few samples


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_it_is_the_eraser_of_concept_erasure(
    name: str, strength: float, tokenizer: Any, demonstrations: list[Demonstration]
) -> None:
    """Two erasers, each fitted on what the one before it leaves; hooks that know nothing of the library."""
    model = build_model(name, vocab_size=len(tokenizer))
    stack = model.model.layers if name == "llama" else model.transformer.h
    config = sealign.LEACEConfig(layers=[0, 2], strength=strength, token="mean")
    edit = fit_edit(model, tokenizer, demonstrations, config=config)
    erasers: dict[int, Any] = {}
    hooks: list[Any] = []

    def erase(layer: int, amount: float) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            erased = x + amount * (erasers[layer](x.double()).to(x.dtype) - x)
            return (erased, *output[1:]) if isinstance(output, tuple) else erased

        return hook

    for layer in (0, 2):
        rows = sealign.collect_activations(
            model, tokenizer, demonstrations, site="residual", layers=[layer], config=config.collect_config()
        )
        x = torch.cat([rows.positive[layer], rows.negative[layer]]).double()
        z = torch.tensor([1.0] * 7 + [0.0] * 7, dtype=torch.float64)
        erasers[layer] = LeaceFitter.fit(x, z).eraser
        hooks.append(stack[layer].register_forward_hook(erase(layer, 1.0)))
    remove(hooks)
    model.double()
    hooks = [stack[layer].register_forward_hook(erase(layer, strength)) for layer in (0, 2)]
    check_against_hooks(model, tokenizer, edit, hooks, least=0.1, tolerance=1e-5)
    assert edit.rank == 1


def test_one_layer_is_fitted_from_activations(llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    config = sealign.LEACEConfig(layers=[2])
    rows = sealign.collect_activations(llama, tokenizer, demonstrations, site="residual", layers=[1, 2])
    found = fit_edit_from_activations(llama, tokenizer, rows, demonstrations, config=config)
    expected: Any = fit_edit(llama, tokenizer, demonstrations, config=config)
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(found.tensors()[name], tensor)
    with pytest.raises(SettingError, match="which is 2 layers, but LEACE fits each layer on activations that the"):
        fit_edit_from_activations(llama, tokenizer, rows, demonstrations, config=config.replace(layers=[1, 2]))


def test_a_fit_that_fails_leaves_nothing(llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    class Stop(Exception):
        pass

    def track(items: Any, *_: Any) -> Any:
        for number, item in enumerate(items):
            if number == 1:
                raise Stop
            yield item

    before = logits(llama, tokenizer)
    with pytest.raises(Stop):
        fit_edit(llama, tokenizer, demonstrations, config=sealign.LEACEConfig(layers="0,1"), track=track)
    assert our_hooks(llama) == 0
    assert torch.equal(logits(llama, tokenizer), before)


def test_a_model_compiled_in_place(tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    """Its graph sees the erasers of earlier layers."""
    config = sealign.LEACEConfig(layers="0,1")
    model = build_model("llama", vocab_size=len(tokenizer))
    plain: Any = fit_edit(model, tokenizer, demonstrations, config=config)
    model.compile(backend="eager")
    compiled: Any = fit_edit(model, tokenizer, demonstrations, config=config)
    tokens = torch.randn(5, 48, generator=torch.Generator().manual_seed(3))
    for layer in (0, 1):
        expected = plain.layer_edits[layer](tokens)
        torch.testing.assert_close(compiled.layer_edits[layer](tokens), expected, rtol=1e-3, atol=1e-3)


def test_layers_by_signature_are_refused(fitted: Callable[[str], Any]) -> None:
    with pytest.raises(SettingError, match="layers is 'signature:3', but LEACE needs layers by position"):
        sealign.LEACEConfig(layers="signature:3")
    assert sealign.LEACEConfig().site == "residual"
    assert fitted("leace").layers == [1, 3]
