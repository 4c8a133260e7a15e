from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor

from sealign.spectral import cross_covariance_matrix as covariance_matrix
from sealign.spectral.cross_covariance import CrossCovariance
from sealign.spectral.cross_covariance_matrix import CovarianceFactor, CrossCovarianceMatrix


def _omega(x: Tensor, y: Tensor, *, centered: bool = False) -> CrossCovarianceMatrix:
    covariance = CrossCovariance(x.shape[1], centered=centered)
    covariance.update(x, y)
    return covariance.compute()


@pytest.mark.parametrize("n", [4, 40], ids=["factors", "dense"])
@pytest.mark.parametrize("centered", [False, True])
def test_products_and_energy(n: int, centered: bool) -> None:
    x, y, vectors = torch.randn(n, 7), torch.randn(n, 7), torch.randn(7, 3, dtype=torch.float64)
    omega = _omega(x, y, centered=centered)
    x, y = (side.double() - side.double().mean(0) * centered for side in (x, y))
    direct = x.T @ y / n
    assert (omega.factors is None) == (n > 7)
    torch.testing.assert_close(omega.matrix, direct)
    torch.testing.assert_close(omega.multiply(vectors), direct @ vectors)
    torch.testing.assert_close(omega.transpose_multiply(vectors), direct.T @ vectors)
    assert omega.energy() == pytest.approx(float(torch.linalg.svdvals(direct).square().sum()))
    assert (omega.rank_bound, omega.width) == (min(n, 7), 7)


def _activations(kind: str, n: int, d: int, seed: int = 0) -> Tensor:
    """Rows as models have them, and as they do not: a large mean, outliers a thousand times the rest, tiny and huge."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, dtype=torch.float64, generator=generator) * torch.arange(1, d + 1).rsqrt()
    match kind:
        case "mean":
            rows = rows + 30 * torch.randn(d, dtype=torch.float64, generator=generator)
        case "outliers":
            rows[:, ::97] *= 1000
        case "tiny":
            rows = rows * 1e-30
        case "huge":
            rows = rows * 1e30
    return rows


@pytest.mark.parametrize("kind", ["plain", "mean", "outliers", "tiny", "huge"])
@pytest.mark.parametrize(("n", "d"), [(37, 530), (600, 1100)])
def test_gram_against_float64(kind: str, n: int, d: int) -> None:
    x = _activations(kind, n, d)
    rows = CovarianceFactor(x)
    scaled = x / x.abs().max()
    exact = scaled @ scaled.T
    lengths = scaled.norm(dim=1)
    error = (rows.gram.double() - exact).abs() / torch.outer(lengths, lengths)
    assert float(error.max()) < 50 * covariance_matrix.GRAM_ERROR  # of one entry; in their sum they cancel
    assert torch.equal(rows.gram, rows.gram.T)
    assert rows.gram is rows.gram


@pytest.mark.parametrize("kind", ["plain", "mean", "outliers", "tiny", "huge"])
@pytest.mark.parametrize(("n", "d"), [(37, 530), (600, 1100)])
def test_approximate_energy_is_within_its_bound(kind: str, n: int, d: int) -> None:
    omega = _omega(_activations(kind, n, d), _activations(kind, n, d, seed=1))
    energy, error = omega.approximate_energy()
    assert abs(energy - omega.energy()) <= error
    assert error < 1e-3 * energy  # of sides that have nothing in common; with a mean in common, as models have it,
    if kind == "mean":
        assert error < 1e-6 * energy


def test_approximate_energy_is_exact_where_its_error_would_be_too_much() -> None:
    n, d = 40, 90
    rows = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    x, y = torch.zeros(n, d, dtype=torch.float64), torch.zeros(n, d, dtype=torch.float64)
    x[:, :20], y[:, :20] = rows[:, :20], rows[:, 20:]  # columns orthogonal to each other, so that X^T Y is rounding
    y[:, :20] += 1e-9 * rows[:, :20]
    omega = _omega(x, y)
    assert omega.approximate_energy() == (omega.energy(), 0.0)
    assert _omega(0 * x, y).approximate_energy() == (0.0, 0.0)
    dense = _omega(torch.randn(9, 4), torch.randn(9, 4))
    assert dense.approximate_energy() == (dense.energy(), 0.0)


@pytest.mark.parametrize("name", ["", ".cuda.matmul", ".mkldnn.matmul"])
def test_float32_that_rounds_to_fewer_digits_is_not_used(name: str) -> None:
    """Whichever of PyTorch's settings allows it: after some of them, the older setting cannot be read."""
    x = _activations("mean", 30, 70)
    exact = (x @ x.T) / x.abs().max() ** 2
    backend: Any = operator.attrgetter(f"backends{name}")(torch)
    before = backend.fp32_precision
    backend.fp32_precision = "tf32"
    try:
        # Rounding each product to float32 would be seen here; TF32 itself needs a GPU.
        torch.testing.assert_close(CovarianceFactor(x).gram, exact.float(), rtol=1e-9, atol=0)
    finally:
        backend.fp32_precision = before


@pytest.mark.parametrize("n", [450, 800], ids=["factors", "dense"])
def test_iterated_subspace_is_near_the_leading_directions_and_values(n: int) -> None:
    x, y = (_activations("plain", n, 600, seed) * 0.97 ** torch.arange(600) for seed in (0, 1))
    omega = _omega(x, y + 2 * x)
    start = torch.randn(omega.rank_bound, 24, generator=torch.Generator().manual_seed(0))
    columns, values = omega.iterate_subspace(start, 12)
    basis = omega.lift_basis(columns)
    torch.testing.assert_close(basis.T @ basis, torch.eye(24, dtype=torch.float64))
    leading, expected, _ = torch.linalg.svd(omega.matrix)
    leading = leading[:, :6]
    assert float(torch.linalg.matrix_norm(leading - basis @ (basis.T @ leading), ord=2)) < 1e-3
    torch.testing.assert_close(values[:6], expected[:6], rtol=1e-3, atol=0)
