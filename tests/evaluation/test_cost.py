"""The cost of a method, by a clock that tells what each call of the model takes."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from sealign.demonstrations.sources import load_demonstrations
from sealign.errors import SettingError
from sealign.evaluation import cost
from sealign.methods import mean_difference as caa
from sealign.methods.registry import fit_method
from tests.conftest import our_hooks


def test_ratios_are_those_of_the_calls(llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of the model takes a second, and two more with the method on it."""
    now = 0.0

    def tick(seconds: float) -> None:
        nonlocal now
        now += seconds

    def slow(_: Tensor) -> Any:
        def change(hidden: Tensor) -> Tensor:
            tick(2.0)
            return hidden

        return change

    monkeypatch.setattr(caa, "adder", slow)
    method = fit_method("caa", llama, tokenizer, load_demonstrations("bundled:truthfulness", limit=4))
    clock = llama.register_forward_pre_hook(lambda *_: tick(1.0))
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now)
    try:
        found = cost.measure_cost(llama, tokenizer, method, prompt_tokens=40, new_tokens=6, rounds=3)
    finally:
        clock.remove()
    assert found.prefill == found.decode == pytest.approx((3.0, 3.0, 3.0))
    assert found.base_milliseconds == pytest.approx((1000 / 40, 1000.0))
    assert our_hooks(llama) == 0


def test_bounds(llama: Any, tokenizer: Any) -> None:
    method = fit_method("dola", llama, tokenizer)
    with pytest.raises(SettingError, match="new_tokens is 1"):
        cost.measure_cost(llama, tokenizer, method, new_tokens=1)
