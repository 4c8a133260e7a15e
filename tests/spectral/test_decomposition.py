from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sealign.errors import DegenerateError, SettingError
from sealign.spectral import decomposition as spectra
from sealign.spectral.cross_covariance import CrossCovariance
from sealign.spectral.cross_covariance_matrix import CrossCovarianceMatrix
from sealign.spectral.decomposition import leading_spectrum
from sealign.spectral.signature import layer_signature


def _omega(x: torch.Tensor, y: torch.Tensor) -> CrossCovarianceMatrix:
    covariance = CrossCovariance(x.shape[1])
    covariance.update(x, y)
    return covariance.compute()


def _with_spectrum(values: np.ndarray, n: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose cross-covariance has the given singular values."""
    generator = np.random.default_rng(seed)
    k = len(values)
    shared = np.linalg.qr(generator.normal(size=(n, k)))[0]
    left = np.linalg.qr(generator.normal(size=(d, k)))[0]
    right = np.linalg.qr(generator.normal(size=(d, k)))[0]
    scale = np.sqrt(values * n)
    return torch.tensor(shared * scale @ left.T), torch.tensor(shared * scale @ right.T)


def _exact_rank(omega: np.ndarray, share: float) -> int:
    values = scipy.linalg.svdvals(omega)
    return int(np.searchsorted(np.cumsum(values**2) / np.sum(values**2), share)) + 1


def _sine(u: torch.Tensor, v: torch.Tensor) -> float:
    """Sine of the largest principal angle between two orthonormal bases."""
    return float(torch.linalg.matrix_norm(u - v @ (v.T @ u), ord=2))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 24), d=st.integers(2, 17), share=st.floats(0.05, 0.999), seed=st.integers(0, 99))
def test_rank_and_subspace_against_scipy(n: int, d: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    y = torch.randn(n, d, dtype=torch.float64, generator=generator)
    dense = (x.T @ y / n).numpy()
    spectrum = leading_spectrum(_omega(x, y), explained_variance=share)
    vectors, values, _ = scipy.linalg.svd(dense)
    k = _exact_rank(dense, share)
    assert spectrum.rank == k
    np.testing.assert_allclose(spectrum.values[: min(n, d)], values[: min(n, d)], rtol=1e-8, atol=1e-10)
    assert spectrum.energy == pytest.approx(np.sum(values**2))
    assert spectrum.explained_variance == pytest.approx(np.sum(values[:k] ** 2) / np.sum(values**2))
    np.testing.assert_allclose(
        (spectrum.vectors @ spectrum.vectors.T).numpy(), vectors[:, :k] @ vectors[:, :k].T, atol=1e-7
    )


@pytest.mark.parametrize("n", [500, 700], ids=["factors", "dense"])
@pytest.mark.parametrize("share", [0.6, 0.9, 0.998])
def test_iteration_agrees_with_the_whole_spectrum(n: int, share: float) -> None:
    values = 0.8 ** np.arange(400) + 1e-5
    x, y = _with_spectrum(values, n, 600)
    iterated = spectra._iterate(_omega(x, y), _omega(x, y).approximate_energy(), share, None, 0)
    assert iterated is not None
    whole, _ = spectra._decompose(_omega(x, y))
    assert iterated.rank == int(np.searchsorted(np.cumsum(values**2) / np.sum(values**2), share)) + 1
    assert _sine(iterated.vectors, whole[:, : iterated.rank]) < 1e-7
    np.testing.assert_allclose(iterated.values, values[: iterated.rank], rtol=1e-9)


def test_iteration_gives_way_where_the_rank_is_not_small() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(450, 500, generator=generator)
    omega = _omega(x, torch.randn(450, 500, generator=generator))
    assert spectra._iterate(omega, omega.approximate_energy(), 0.99, None, 0) is None
    dense = omega.multiply(torch.eye(500, dtype=torch.float64)).numpy()
    assert leading_spectrum(omega, explained_variance=0.99).rank == _exact_rank(dense, 0.99)


@pytest.mark.parametrize("gap", [1e-3, 1e-5, 1e-12])
def test_close_singular_values_are_told_apart_as_far_as_float64_does(gap: float) -> None:
    """Rounding leaves a residual that no round lowers: where the gap is not far above it, the whole decides."""
    values = np.concatenate([[30.0], np.ones(3), np.full(3, 1 - gap), 0.5 * 0.7 ** np.arange(60)])
    x, y = _with_spectrum(values, 500, 600)
    iterated = spectra._iterate(_omega(x, y), _omega(x, y).approximate_energy(), None, 4, 0)
    assert (iterated is None) == (gap < 1e-9)
    if iterated is not None:
        assert _sine(iterated.vectors, spectra._decompose(_omega(x, y))[0][:, :4]) < 1e-5


def test_iteration_gives_way_at_a_tie() -> None:
    # Three of four equal energies are exactly 0.75 of the whole.
    x, y = _with_spectrum(np.ones(4), 420, 410)
    assert spectra._iterate(_omega(x, y), (4.0, 0.0), 0.75, None, 0) is None


@pytest.mark.parametrize("seed", [1, 2])
def test_result_does_not_depend_on_the_seed(seed: int) -> None:
    x, y = _with_spectrum(0.7 ** np.arange(400) + 1e-6, 400, 500)
    first, other = (leading_spectrum(_omega(x, y), explained_variance=0.99, seed=s) for s in (0, seed))
    assert first.rank == other.rank
    torch.testing.assert_close(first.vectors, other.vectors, rtol=0, atol=1e-6)
    again = leading_spectrum(_omega(x, y), explained_variance=0.99, seed=0)
    assert torch.equal(first.vectors, again.vectors)


@pytest.mark.parametrize("size", [9, 500], ids=["whole", "iterated"])
def test_integer_rank(size: int) -> None:
    x, y = _with_spectrum(0.6 ** np.arange(8), size, size + 3)
    spectrum = leading_spectrum(_omega(x, y), rank=5)
    assert spectrum.rank == 5
    np.testing.assert_allclose(spectrum.values[:5], 0.6 ** np.arange(5), rtol=1e-8)


def test_all_of_the_variance_is_the_numerical_rank() -> None:
    x, y = _with_spectrum(np.array([3.0, 2.0, 1.0, 1e-6]), 30, 21)
    assert leading_spectrum(_omega(x, y), explained_variance=1.0).rank == 4


@pytest.mark.parametrize("extra", [0, 3], ids=["dense", "factors"])
def test_a_share_that_is_reached_exactly_needs_no_further_direction(extra: int) -> None:
    """Four equal singular values, 1 / 4 each: three of them are exactly three quarters."""
    rows = torch.eye(4, 4 + extra, dtype=torch.float64)
    for share, rank in ((0.25, 1), (0.5, 2), (0.75, 3), (0.75 + 1e-12, 4)):
        assert leading_spectrum(_omega(rows, rows), explained_variance=share).rank == rank


def test_duplicate_rows_and_two_rows() -> None:
    row = torch.randn(1, 6)
    spectrum = leading_spectrum(_omega(row.expand(5, 6), row.expand(5, 6)), explained_variance=0.999)
    assert spectrum.rank == 1
    x, y = torch.randn(2, 6), torch.randn(2, 6)
    assert leading_spectrum(_omega(x, y), explained_variance=1.0).rank == 2


def test_one_dominant_direction() -> None:
    x, y = _with_spectrum(np.array([1e6, 1.0, 0.5]), 12, 9)
    assert leading_spectrum(_omega(x, y), explained_variance=0.998).rank == 1


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_does_not_matter(scale: float) -> None:
    x, y = torch.randn(20, 11, dtype=torch.float64), torch.randn(20, 11, dtype=torch.float64)
    one, other = (leading_spectrum(_omega(s * x, s * y), explained_variance=0.9) for s in (1.0, scale))
    assert one.rank == other.rank
    torch.testing.assert_close(one.vectors, other.vectors)


def test_degenerate_inputs_are_refused_by_name() -> None:
    zero = torch.zeros(5, 4)
    with pytest.raises(DegenerateError, match="cross-covariance is zero"):
        leading_spectrum(_omega(zero, zero), explained_variance=0.9)
    x, y = _with_spectrum(np.array([2.0, 1.0]), 12, 9)
    with pytest.raises(DegenerateError, match="rank is 3, but the cross-covariance has only 2"):
        leading_spectrum(_omega(x, y), rank=3)
    x, y = _with_spectrum(np.array([2.0, 1.0]), 500, 600)
    with pytest.raises(DegenerateError, match="rank is 3, but the cross-covariance has only 2"):
        leading_spectrum(_omega(x, y), rank=3)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.0001, float("nan")])
def test_explained_variance_outside_its_range(share: float) -> None:
    x = torch.randn(5, 4)
    with pytest.raises(SettingError, match=r"must be in \(0, 1\]"):
        leading_spectrum(_omega(x, x), explained_variance=share)


def test_rank_outside_its_range_and_both_targets() -> None:
    x = torch.randn(5, 4)
    for rank in (0, 5):
        with pytest.raises(SettingError, match=rf"rank is {rank}, but it must be in \[1, 4\]"):
            leading_spectrum(_omega(x, x), rank=rank)
    with pytest.raises(SettingError, match="exactly one"):
        leading_spectrum(_omega(x, x), rank=1, explained_variance=0.5)
    with pytest.raises(SettingError, match="exactly one"):
        leading_spectrum(_omega(x, x))


def test_signature_against_its_formulas() -> None:
    positive, negative = torch.randn(6, 5) + 1, torch.randn(6, 5) - 1
    stacked = np.concatenate([positive, negative]).astype(np.float64)
    labels = np.repeat(np.eye(2), 6, axis=0)
    expected = scipy.linalg.svdvals(stacked.T @ labels / 12).sum()
    assert layer_signature(positive, negative) == pytest.approx(expected)
    gap = (positive.double().mean(0) - negative.double().mean(0)).norm()
    assert layer_signature(positive, negative, centered=True) == pytest.approx(float(gap) / 8**0.5)
    assert layer_signature(positive, positive, centered=True) == pytest.approx(0, abs=1e-9)
