"""Truncated decomposition of a cross-covariance: leading singular vectors for an explained variance or a rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.errors import DegenerateError, SettingError
from sealign.spectral.cross_covariance_matrix import CrossCovarianceMatrix

EXACT_BELOW = 384
"""Largest min(n, d) for which all singular values are computed, which is faster there than iterating."""

ANGLE_TOLERANCE = 1e-6
"""Largest accepted sine of the angle to the true subspace; about the accuracy of float32 activations."""

TIE_TOLERANCE = 1e-10
"""Explained variances closer than this to the requested one are decided by all singular values."""

GROW_ROUNDS = 2
"""Number of float32 iterations after which the size of a block is judged."""

START_ROUNDS = 5
"""Number of float32 iterations before the first in float64."""

ROUNDING = 16 * torch.finfo(torch.float64).eps
"""Residual per singular vector due to float64 rounding, relative to the largest squared singular value; measured."""

MAX_ITERATIONS = 60
"""Largest number of float64 iterations before all singular values are computed instead."""


@dataclass(frozen=True)
class Spectrum:
    """Leading left singular vectors of Omega, and the variance they explain.

    Attributes:
        vectors: U[:, :k], (d, k) float64, with orthonormal columns; the largest entry of each column is positive.
        values: Leading singular values in descending order, (m,) float64 with m >= k.
        energy: Sum of all squared singular values of Omega.

    Example:
        >>> import torch
        >>> from sealign.spectral.cross_covariance import CrossCovariance
        >>> covariance = CrossCovariance(2)
        >>> covariance.update(torch.eye(2), torch.diag(torch.tensor([4.0, 3.0])))
        >>> leading_spectrum(covariance.compute(), explained_variance=0.6).explained_variance
        0.64
    """

    vectors: Float[Tensor, "d k"]
    values: Float[Tensor, " m"]
    energy: float

    @property
    def rank(self) -> int:
        """Number of vectors k."""
        return self.vectors.shape[1]

    @property
    def explained_variance(self) -> float:
        """Share of the energy in the first k singular values, in (0, 1]."""
        return float(self.values[: self.rank].square().sum()) / self.energy


def leading_spectrum(
    omega: CrossCovarianceMatrix,
    *,
    explained_variance: float | None = None,
    rank: int | None = None,
    seed: int = 0,
) -> Spectrum:
    """Return the smallest number of leading left singular vectors that explain a fraction of the variance.

    k = min { j : sum_{i<=j} s_i^2 >= K sum_i s_i^2 } (Qiu et al. 2024, arXiv 2405.09719, section 3), or exactly
    ``rank``. Small matrices are decomposed completely. For others, a block subspace iteration finds the leading
    singular vectors only; the complete decomposition is used where k is not small or is a tie.

    Args:
        omega: Cross-covariance to decompose.
        explained_variance: Fraction K of the sum of squared singular values to explain, in (0, 1]; 1 keeps every
            singular value above rounding.
        rank: Number of vectors k, in [1, d]. Give either ``rank`` or ``explained_variance``.
        seed: Seed of the start block of the iteration. The result does not depend on it beyond rounding.

    Raises:
        SettingError: ``explained_variance`` or ``rank`` is out of range, or not exactly one of them is given.
        DegenerateError: Omega is zero, or has fewer than ``rank`` singular values above rounding.

    Example:
        >>> import torch
        >>> from sealign.spectral.cross_covariance import CrossCovariance
        >>> covariance = CrossCovariance(2)
        >>> covariance.update(torch.eye(2), torch.diag(torch.tensor([4.0, 3.0])))
        >>> leading_spectrum(covariance.compute(), rank=1).values
        tensor([2.0000, 1.5000], dtype=torch.float64)
    """
    _check_target(omega.width, explained_variance, rank)
    energy, error = omega.approximate_energy()
    if not energy > 0:
        raise DegenerateError(
            "the cross-covariance is zero and has no directions to keep or drop; "
            "use demonstrations whose activations differ from zero and, if centred, from each other"
        )
    if omega.rank_bound > EXACT_BELOW:
        spectrum = _iterate(omega, (energy, error), explained_variance, rank, seed)
        if spectrum is not None:
            return spectrum
    vectors, values = _decompose(omega)
    energy = float(values.square().sum())
    k = _exact_rank(values, omega.width, explained_variance, rank)
    return Spectrum(_fix_signs(vectors[:, :k]), values, energy)


def _check_target(width: int, explained_variance: float | None, rank: int | None) -> None:
    if (explained_variance is None) == (rank is None):
        raise SettingError("give exactly one of explained_variance and rank")
    if explained_variance is not None and not 0 < explained_variance <= 1:
        raise SettingError(f"explained_variance is {explained_variance}, but it must be in (0, 1]; try 0.9 or 0.998")
    if rank is not None and not 1 <= rank <= width:
        raise SettingError(
            f"rank is {rank}, but it must be in [1, {width}], where {width} is the width of the activations"
        )


def _decompose(omega: CrossCovarianceMatrix) -> tuple[Tensor, Tensor]:
    """Return all left singular vectors and values, by way of an (n, n) matrix when n < d."""
    if omega.factors is None:
        vectors, values, _ = torch.linalg.svd(omega.matrix, full_matrices=False)
        return vectors, values
    # With X^T = Q_x R_x and Y^T = Q_y R_y, Omega = Q_x (R_x R_y^T) Q_y^T; only the (n, n) core is decomposed.
    left, right = omega.factors
    basis, upper = torch.linalg.qr(left.values.T)
    _, other = torch.linalg.qr(right.values.T, mode="r")
    core, values, _ = torch.linalg.svd(upper @ other.T / omega.rank_bound)
    return basis @ core, values


def _numerical_rank(values: Tensor, width: int) -> int:
    threshold = values[0] * width * torch.finfo(torch.float64).eps
    return int((values > threshold).sum())


def _exact_rank(values: Tensor, width: int, explained_variance: float | None, rank: int | None) -> int:
    available = _numerical_rank(values, width)
    if rank is not None:
        if rank > available:
            raise DegenerateError(
                f"rank is {rank}, but the cross-covariance has only {available} singular values above "
                "rounding; lower the rank or add demonstrations"
            )
        return rank
    assert explained_variance is not None
    if explained_variance == 1:
        return available
    energies = values.square()
    reached = energies.cumsum(0) >= explained_variance * energies.sum()
    return min(int(reached.int().argmax()) + 1, available)


def _iterate(
    omega: CrossCovarianceMatrix,
    energy: tuple[float, float],
    explained_variance: float | None,
    rank: int | None,
    seed: int,
) -> Spectrum | None:
    """Run block subspace iteration with Rayleigh-Ritz; return None where all singular values must be computed.

    After iterations in float32, each iteration in float64 multiplies the block by Omega Omega^T. A subspace of
    dimension k is accepted when its residual is small relative to the gap to the next Ritz value: the ratio bounds the
    sine of the angle to the true subspace (Davis-Kahan theorem).

    Args:
        omega: Cross-covariance to decompose.
        energy: Sum of all squared singular values, and a bound of its error.
        explained_variance, rank, seed: As for ``leading_spectrum``.
    """
    limit = omega.rank_bound // 3
    size = max(16, 2 * rank if rank is not None else 0)
    if explained_variance == 1 or size > limit:
        return None
    columns = _grow_block(omega, energy, explained_variance, rank, size, torch.Generator().manual_seed(seed))
    basis = omega.lift_basis(columns)
    for _ in range(MAX_ITERATIONS):
        images = omega.transpose_multiply(basis)
        # (Omega^T V)^T (Omega^T V) = W S^2 W^T gives the Ritz vectors V W and values S^2 of Omega Omega^T.
        squares, rotation = torch.linalg.eigh(images.T @ images)
        squares, rotation = squares.flip(0).clamp(min=0), rotation.flip(1)
        k = _ritz_rank(squares.sqrt(), energy, explained_variance, rank)
        if k == 0 and energy[1]:
            energy = omega.energy(), 0.0
            k = _ritz_rank(squares.sqrt(), energy, explained_variance, rank)
        if not k or k == len(squares):
            return None
        vectors, kept = basis @ rotation[:, :k], omega.multiply(images @ rotation[:, :k])
        residual = torch.linalg.matrix_norm(kept - vectors * squares[:k])
        accepted = ANGLE_TOLERANCE * (squares[k - 1] - squares[k])
        if accepted < ROUNDING * k**0.5 * squares[0]:
            return None
        if residual <= accepted:
            return Spectrum(_fix_signs(vectors), squares[:k].sqrt(), energy[0])
        others = omega.multiply(images @ rotation[:, k:])
        basis, _ = torch.linalg.qr(torch.cat([kept, others], dim=1))
    return None


def _grow_block(
    omega: CrossCovarianceMatrix,
    energy: tuple[float, float],
    explained_variance: float | None,
    rank: int | None,
    size: int,
    generator: torch.Generator,
) -> Tensor:
    """Return a float32 block, enlarged until it is three times the requested rank or too large to be worthwhile."""
    columns = torch.empty(omega.rank_bound, 0, device=omega.device)
    while True:
        fresh = torch.randn(omega.rank_bound, size - columns.shape[1], generator=generator)
        columns, values = omega.iterate_subspace(torch.cat([columns, fresh.to(omega.device)], dim=1), GROW_ROUNDS)
        k = _ritz_rank(values, energy, explained_variance, rank)
        if (k is not None and k <= size // 3) or 2 * size > omega.rank_bound // 3:
            return omega.iterate_subspace(columns, START_ROUNDS)[0]
        size *= 2


def _ritz_rank(
    values: Tensor, energy: tuple[float, float], explained_variance: float | None, rank: int | None
) -> int | None:
    """Return the requested rank; None if the Ritz values explain too little, 0 if the rank is a tie."""
    if rank is not None:
        return rank
    assert explained_variance is not None
    total, error = energy
    fractions = values.square().cumsum(0) / total
    if bool(((fractions - explained_variance).abs() < max(TIE_TOLERANCE, error / total)).any()):
        return 0
    reached = fractions >= explained_variance
    return int(reached.int().argmax()) + 1 if bool(reached.any()) else None


def _fix_signs(vectors: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """Make the largest entry of each column positive, so that the sign of a singular vector is unique."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)
