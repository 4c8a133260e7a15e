"""The contrast of DoLa, CD and ICD against the formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, softmax

from sealign.methods.contrast import IMPLAUSIBLE, contrast, jensen_shannon

LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=5, max_size=5)


@given(LOGITS, LOGITS, st.floats(0.01, 1.0), st.floats(0.25, 3.0))
@settings(max_examples=60, deadline=None)
def test_contrast_is_its_formula(expert: list[float], amateur: list[float], alpha: float, weight: float) -> None:
    found = contrast(torch.tensor(expert), torch.tensor(amateur), plausibility=alpha, weight=weight).double().numpy()
    p, q = (log_softmax(np.array(row, dtype=np.float64)) for row in (expert, amateur))
    for token in range(5):
        margin = p[token] - (p.max() + math.log(alpha))
        if abs(margin) < 1e-4:
            continue  # on the bound, where float32 and float64 may disagree
        expected = weight * p[token] - q[token] if margin > 0 else IMPLAUSIBLE
        assert np.isclose(found[token], expected, rtol=1e-4, atol=1e-3)


def test_the_most_probable_token_is_always_plausible() -> None:
    expert = torch.randn(3, 4, 11, generator=torch.Generator().manual_seed(0))
    amateur = torch.randn(3, 4, 11, generator=torch.Generator().manual_seed(1))
    found = contrast(expert, amateur, plausibility=1.0)
    assert torch.equal(found > IMPLAUSIBLE, expert == expert.max(-1, keepdim=True).values)
    assert bool((contrast(expert, amateur, plausibility=0.0) > IMPLAUSIBLE).all())


def test_an_amateur_like_the_expert_leaves_plausible_tokens_equal() -> None:
    logits = torch.randn(7, 13, generator=torch.Generator().manual_seed(2))
    found = contrast(logits, logits)
    kept = found > IMPLAUSIBLE
    assert torch.allclose(found[kept], torch.zeros(()), atol=1e-5)


@given(LOGITS, LOGITS)
@settings(max_examples=60, deadline=None)
def test_jensen_shannon_is_scipys(first: list[float], second: list[float]) -> None:
    found = jensen_shannon(torch.tensor(first), torch.tensor(second)).item()
    expected = jensenshannon(softmax(np.array(first)), softmax(np.array(second))) ** 2
    assert math.isclose(found, 0.0 if math.isnan(expected) else expected, rel_tol=1e-3, abs_tol=1e-5)
    assert 0 <= found <= math.log(2) + 1e-6
