"""The cost of an edit, by a clock that advances with each call of the model and of the edit."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import sealign
from sealign.edits.layer_edit import LayerEdit
from sealign.errors import SettingError
from sealign.evaluation import cost
from tests.conftest import our_hooks


def test_ratios_are_those_of_the_calls(
    llama: Any, tokenizer: Any, small_edit: sealign.Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call of the model takes a second, and two more with the edit."""
    now = 0.0

    def tick(seconds: float) -> None:
        nonlocal now
        now += seconds

    def slow(_: LayerEdit, tokens: Tensor, _strength: float) -> Tensor:
        tick(2.0)
        return tokens

    monkeypatch.setattr(LayerEdit, "__call__", slow)
    edit = small_edit.with_layers([1])
    clock = llama.register_forward_pre_hook(lambda *_: tick(1.0))
    monkeypatch.setattr("sealign.evaluation.cost.time.perf_counter", lambda: now)
    try:
        found = cost.measure_cost(llama, tokenizer, edit, prompt_tokens=40, new_tokens=6, rounds=3)
    finally:
        clock.remove()
    assert found.prefill == found.decode == pytest.approx((3.0, 3.0, 3.0))
    assert found.base_milliseconds == pytest.approx((1000 / 40, 1000.0))
    assert our_hooks(llama) == 0


def test_bounds(llama: Any, tokenizer: Any) -> None:
    edit = sealign.fit_edit(llama, tokenizer, config=sealign.DoLaConfig())
    for name, value, bound in (("new_tokens", 1, 2), ("prompt_tokens", 0, 1), ("rounds", 0, 1)):
        with pytest.raises(SettingError, match=f"{name} is {value}, but it must be at least {bound}"):
            cost.measure_cost(llama, tokenizer, edit, **{name: value})
