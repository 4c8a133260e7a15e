"""Statistics of a layer against the formulas in float64, for any split into parts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sealign.errors import ActivationError
from sealign.fitting.layer_statistics import SAMPLE, LayerStatistics
from sealign.methods.sea import SEAConfig, decompose, fit_projection
from sealign.spectral.feature_maps import get_feature_map
from sealign.spectral.signature import layer_signature
from tests.shapes import unchecked

D = 6


def draw(count: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(count, D, dtype=torch.float64, generator=generator).to(dtype) + role for role in range(3)]


def added(parts: list[list[torch.Tensor]], **made: object) -> LayerStatistics:
    statistics = LayerStatistics(D, **made)  # type: ignore[arg-type]
    for part in parts:
        statistics.update(*part)
    return statistics


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.booleans(), st.sampled_from(["identity", "tanh"]))
def test_any_split_gives_the_formulas(sizes: list[int], centered: bool, feature_map: str) -> None:
    neutral, positive, negative = draw(sum(sizes))
    parts = [
        list(part) for part in zip(*(matrix.split(sizes) for matrix in (neutral, positive, negative)), strict=True)
    ]
    statistics = added(parts, centered=centered, feature_map=feature_map)
    phi = get_feature_map(feature_map).forward
    assert statistics.count == sum(sizes)
    torch.testing.assert_close(statistics.mean, phi(neutral).mean(0))
    for covariance, target in ((statistics.positive, positive), (statistics.negative, negative)):
        x, y = phi(neutral), phi(target)
        if centered:
            x, y = x - x.mean(0), y - y.mean(0)
        found = covariance.compute().multiply(torch.eye(D, dtype=torch.float64))
        torch.testing.assert_close(found, x.T @ y / sum(sizes))
    assert statistics.signature == pytest.approx(layer_signature(positive, negative, centered=centered), rel=1e-9)
    torch.testing.assert_close(statistics.neutral_sample, neutral)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_decompose_as_rows_do(dtype: torch.dtype) -> None:
    matrices = draw(19, dtype)
    expected = fit_projection(*matrices, rank=(3, 2), centered=True)
    out = (torch.zeros(D, D, dtype=torch.float64), torch.zeros(D, D, dtype=torch.float64))
    parts = [[matrix[start : start + 4] for matrix in matrices] for start in range(0, 19, 4)]
    found = decompose(added(parts, centered=True, out=out), SEAConfig(rank=(3, 2), centered=True))[0]
    assert found.positive.dtype == expected.positive.dtype == dtype
    for name in ("positive", "negative"):
        own, other = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(own @ own.T, other @ other.T, atol=1e-5, rtol=1e-5)
    assert bool(out[0].any())
    assert bool(out[1].any())


def test_few_neutral_rows_are_kept() -> None:
    matrices = [torch.randn(SAMPLE + 7, D) for _ in range(3)]
    assert torch.equal(added([matrices]).neutral_sample, matrices[0][:SAMPLE])
    for first in (SAMPLE, SAMPLE - 1):
        batches = [[matrix[:first] for matrix in matrices], [matrix[first:] for matrix in matrices]]
        assert torch.equal(added(batches).neutral_sample, matrices[0][:SAMPLE])


def test_rows_that_cannot_be_added() -> None:
    good = torch.ones(3, D)
    with unchecked(), pytest.raises(ActivationError, match="of one shape"):
        added([[good, good, torch.ones(2, D)]])
    bad = good.clone()
    bad[1, 2] = float("nan")
    with pytest.raises(ActivationError, match="row 1 of the negative activations"):
        added([[good, good, bad]])
