from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealign.playground.listed_tokens import divergence_bound, likeliest_tokens


@given(st.lists(st.floats(0.01, 1), min_size=25, max_size=25), st.lists(st.floats(0.01, 1), min_size=25, max_size=25))
def test_the_bound_is_below_the_divergence(first: list[float], second: list[float]) -> None:
    p, q = (np.array(each) / sum(each) for each in (first, second))
    exact = float((p * np.log(p / q)).sum())
    listed = [{int(i): (math.log(each[i]), "") for i in np.argsort(-each)[:20]} for each in (p, q)]
    assert divergence_bound(*listed) <= exact + 1e-12
    whole = [{i: (math.log(value), "") for i, value in enumerate(each)} for each in (p, q)]
    assert divergence_bound(*whole) == pytest.approx(exact, abs=1e-9)
    assert divergence_bound({1: (0.0, "")}, {2: (0.0, "")}) == 0.0


def test_the_likeliest_come_first() -> None:
    listed = {7: (-2.0, "b"), 3: (-0.5, "a"), 9: (-8.0, "c")}
    assert likeliest_tokens(listed, 2) == [
        {"name": "a", "log_probability": -0.5},
        {"name": "b", "log_probability": -2.0},
    ]
