from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

import sealign
from sealign.playground import token_effects as effects
from sealign.playground.token_effects import token_effects
from tests.conftest import our_hooks
from tests.tiny_models import build_model

PROMPT, ANSWER = [5, 9, 33, 41, 8], [77, 12, 60, 3, 18, 44, 90]


@torch.no_grad()
def log_probabilities(model: Any) -> np.ndarray[Any, Any]:
    """log p of each token of the answer over the vocabulary, in float64 by NumPy from a run of all tokens."""
    logits = model(input_ids=torch.tensor([PROMPT + ANSWER])).logits[0, len(PROMPT) - 1 : -1]
    found: np.ndarray[Any, Any] = log_softmax(logits.double().numpy(), axis=-1)
    return found


@pytest.mark.parametrize("positions", [2, 7, 32])
def test_against_the_definition_in_float64(
    tokenizer: Any, small_edit: sealign.Edit, monkeypatch: pytest.MonkeyPatch, positions: int
) -> None:
    monkeypatch.setattr(effects, "_POSITIONS", positions)
    model = build_model("llama", vocab_size=len(tokenizer)).double()
    base = log_probabilities(model)
    with sealign.apply_edit(model, small_edit, ignore_mismatch=True):
        edited = log_probabilities(model)
    found = token_effects(model, PROMPT, ANSWER, small_edit, alternatives=3)
    assert [effect.token for effect in found] == ANSWER
    for row, effect in enumerate(found):
        assert effect.divergence == pytest.approx((np.exp(base[row]) * (base[row] - edited[row])).sum(), abs=1e-12)
        assert effect.base == pytest.approx(base[row, effect.token], abs=1e-12)
        assert effect.edited == pytest.approx(edited[row, effect.token], abs=1e-12)
        for options, logs in ((effect.base_alternatives, base[row]), (effect.edited_alternatives, edited[row])):
            order = np.argsort(-logs)[:3]
            assert [one.token for one in options] == order.tolist()
            assert [one.log_probability for one in options] == pytest.approx(logs[order].tolist(), abs=1e-12)
    assert max(effect.divergence for effect in found) > 1e-3
    assert our_hooks(model) == 0


def test_without_an_edit_nothing_diverges(llama: Any) -> None:
    found = token_effects(llama, PROMPT, ANSWER, None)
    assert all(effect.divergence == 0 and effect.base == effect.edited for effect in found)
    assert len(found[0].base_alternatives) == 5


def test_the_logits_are_those_that_generated_the_answer(llama: Any, small_edit: sealign.Edit) -> None:
    """A greedy answer of the edited model: each token is the likeliest one under it."""
    strong = small_edit.with_strength(3.0)
    with sealign.apply_edit(llama, strong):
        answer = llama.generate(input_ids=torch.tensor([PROMPT]), max_new_tokens=9, do_sample=False)[0, 5:].tolist()
    found = token_effects(llama, PROMPT, answer, strong)
    assert [effect.edited_alternatives[0].token for effect in found] == answer
    assert any(effect.base_alternatives[0].token != effect.token for effect in found)


def test_a_method_that_excludes_tokens(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    """A contrast leaves out all but the plausible tokens, where the base model has some probability."""
    edit = sealign.fit_edit(llama, tokenizer, demonstrations, config=sealign.ICDConfig(plausibility=0.5))
    found = token_effects(llama, PROMPT, ANSWER, edit)
    assert all(effect.divergence > 100 for effect in found)
    assert all(effect.base > -20 for effect in found)


def test_logits_that_are_not_finite(monkeypatch: pytest.MonkeyPatch, llama: Any) -> None:
    excluded, nan = -math.inf, math.nan
    base = torch.tensor([[0.0, 0.0, excluded, excluded], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    edited = torch.tensor([[0.0, math.log(3), excluded, 0.0], [0.0, 0.0, excluded, 0.0], [nan, 0.0, 0.0, 0.0]])
    given = iter((base, edited))
    monkeypatch.setattr(effects, "_logits", lambda *_: next(given))
    first, second, third = token_effects(llama, PROMPT, [1, 2, 3], None)
    assert first.divergence == pytest.approx(0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.6))
    assert (second.divergence, second.edited) == (math.inf, excluded)
    assert math.isnan(third.divergence)
    assert len(first.base_alternatives) == 4  # there are no five tokens


def test_a_model_that_computes_all_logits(tiny_model: Any, tokenizer: Any, demonstrations: Any) -> None:
    model = tiny_model("rwkv")
    config = sealign.MeanDifferenceConfig(site="residual", layers=(1,), strength=1.0)
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=config)
    base = log_probabilities(model)
    found = token_effects(model, PROMPT, ANSWER, edit)
    assert [effect.base for effect in found] == pytest.approx([base[row, t] for row, t in enumerate(ANSWER)], abs=1e-5)
