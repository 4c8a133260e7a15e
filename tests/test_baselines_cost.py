"""The cost of a method: ratios in one run, of what it really does."""

from __future__ import annotations

import time
from typing import Any

import pytest
from torch import Tensor

from sealign.baselines import caa
from sealign.baselines.cost import measure_cost
from sealign.baselines.registry import fit_method
from sealign.demonstrations import load_demonstrations
from sealign.errors import SettingError
from tests.conftest import our_hooks


def test_a_slow_method_costs_what_it_takes(llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that waits 40 ms at every call of the model, many times what the tiny model takes."""

    def waiting(_: Tensor) -> Any:
        def wait(hidden: Tensor) -> Tensor:
            time.sleep(0.04)
            return hidden

        return wait

    monkeypatch.setattr(caa, "adder", waiting)
    method = fit_method("caa", llama, tokenizer, load_demonstrations("bundled:truthfulness", limit=4))
    cost = measure_cost(llama, tokenizer, method, prompt_tokens=40, new_tokens=6, rounds=3)
    for middle, low, high in (cost.prefill, cost.decode):
        assert 1.5 < low <= middle <= high
    assert min(cost.base_milliseconds) > 0
    assert our_hooks(llama) == 0


def test_bounds(llama: Any, tokenizer: Any) -> None:
    method = fit_method("dola", llama, tokenizer)
    with pytest.raises(SettingError, match="new_tokens is 1"):
        measure_cost(llama, tokenizer, method, new_tokens=1)
