"""Truncated decomposition of a cross-covariance: singular values, explained variance, rank, signature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.covariance import CrossCovarianceMatrix
from sealign.errors import DegenerateError, SettingError

EXACT_BELOW = 384
"""Up to this min(n, d) the whole spectrum is computed: it is faster than iterating there."""

ANGLE_TOLERANCE = 1e-9
"""Largest sine of the angle between an accepted subspace and the true one."""

TIE_TOLERANCE = 1e-10
"""Shares of energy closer than this to the asked one are decided by the full spectrum."""

MAX_ITERATIONS = 60


@dataclass(frozen=True)
class Spectrum:
    """The leading left singular vectors of Omega, and what they explain.

    Attributes:
        vectors: U[:, :k], (d, k) float64, orthonormal; each column's largest entry is positive.
        values: the leading singular values that are known, (m,) float64 with m >= k, falling.
        energy: sum of all squared singular values of Omega.

    Example:
        >>> import torch
        >>> from sealign.covariance import CrossCovariance
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
        """k, the number of vectors kept."""
        return self.vectors.shape[1]

    @property
    def explained_variance(self) -> float:
        """The share of the energy that the k kept singular values hold, in (0, 1]."""
        return float(self.values[: self.rank].square().sum()) / self.energy


def leading_spectrum(
    omega: CrossCovarianceMatrix,
    *,
    explained_variance: float | None = None,
    rank: int | None = None,
    seed: int = 0,
) -> Spectrum:
    """Return the smallest leading left singular subspace that explains a share of the variance.

    k = min { j : sum_{i<=j} s_i^2 >= K sum_i s_i^2 } (Qiu et al. 2024, arXiv 2405.09719, section 3), or
    exactly ``rank``. Where the spectrum is small it is computed whole; otherwise a block subspace iteration
    finds its leading part only, and the whole is computed where that part is not small or where k is a tie.

    Args:
        omega: the cross-covariance.
        explained_variance: K in (0, 1]; 1 keeps every singular value above rounding.
        rank: k in [1, d], in place of ``explained_variance``.
        seed: of the start block; the result does not depend on it beyond rounding.

    Raises:
        SettingError: K is outside (0, 1], rank outside [1, d], or not exactly one of them is given.
        DegenerateError: Omega is zero, or has fewer than ``rank`` singular values above rounding.

    Example:
        >>> import torch
        >>> from sealign.covariance import CrossCovariance
        >>> covariance = CrossCovariance(2)
        >>> covariance.update(torch.eye(2), torch.diag(torch.tensor([4.0, 3.0])))
        >>> leading_spectrum(covariance.compute(), rank=1).values
        tensor([2.0000, 1.5000], dtype=torch.float64)
    """
    _check_target(omega.width, explained_variance, rank)
    energy = omega.energy()
    if not energy > 0:
        raise DegenerateError(
            "the cross-covariance is zero, so it has no directions to keep or drop; "
            "use demonstrations whose activations differ from zero and, if centred, from each other"
        )
    if omega.rank_bound > EXACT_BELOW:
        spectrum = _iterate(omega, energy, explained_variance, rank, seed)
        if spectrum is not None:
            return spectrum
    vectors, values = _decompose(omega)
    energy = float(values.square().sum())
    k = _exact_rank(values, omega.width, explained_variance, rank)
    return Spectrum(_fix_signs(vectors[:, :k]), values, energy)


def _check_target(width: int, explained_variance: float | None, rank: int | None) -> None:
    if (explained_variance is None) == (rank is None):
        raise SettingError("give exactly one of explained_variance and rank, not both and not neither")
    if explained_variance is not None and not 0 < explained_variance <= 1:
        raise SettingError(f"explained_variance is {explained_variance}, but it must be in (0, 1]; try 0.9 or 0.998")
    if rank is not None and not 1 <= rank <= width:
        raise SettingError(f"rank is {rank}, but it must be in [1, {width}], the width of the activations")


def _decompose(omega: CrossCovarianceMatrix) -> tuple[Tensor, Tensor]:
    """Return all left singular vectors and values, through the n x n core when n < d."""
    if omega.left is None or omega.right is None:
        assert omega.dense is not None
        vectors, values, _ = torch.linalg.svd(omega.dense, full_matrices=False)
        return vectors, values
    # X^T = Q_x R_x and Y^T = Q_y R_y, so Omega = Q_x (R_x R_y^T) Q_y^T and only the core is decomposed.
    basis, left = torch.linalg.qr(omega.left.T)
    _, right = torch.linalg.qr(omega.right.T, mode="r")
    core, values, _ = torch.linalg.svd(left @ right.T)
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
    omega: CrossCovarianceMatrix, energy: float, explained_variance: float | None, rank: int | None, seed: int
) -> Spectrum | None:
    """Block subspace iteration with Rayleigh-Ritz; None where the whole spectrum should decide.

    Each round multiplies by Omega Omega^T. A subspace of dimension k is accepted when its residual over the
    gap to the next Ritz value, which bounds the sine of its angle to the true one (Davis-Kahan), is small.
    """
    if explained_variance == 1:
        return None
    generator = torch.Generator().manual_seed(seed)
    device = (omega.left if omega.left is not None else omega.dense).device  # type: ignore[union-attr]

    def random_block(columns: int) -> Tensor:
        block = torch.randn(omega.width, columns, dtype=torch.float64, generator=generator)
        return block.to(device)

    limit = omega.rank_bound // 3
    size = max(16, 2 * rank if rank is not None else 0)
    if size > limit:
        return None
    basis, _ = torch.linalg.qr(random_block(size))
    for _ in range(MAX_ITERATIONS):
        images = omega.transpose_multiply(basis)
        # V^T Omega = W S Z^T gives the Ritz vectors V W and values S^2 of Omega Omega^T.
        rotation, values, _ = torch.linalg.svd(images.T, full_matrices=False)
        vectors = basis @ rotation
        products = omega.multiply(images @ rotation)
        k = _ritz_rank(values, energy, explained_variance, rank)
        if k is None or k > 3 * size // 4:
            if 2 * size > limit:
                return None
            size *= 2
            products = torch.cat([products, random_block(size // 2)], dim=1)
        elif k == 0:
            return None
        else:
            residual = products[:, :k] - vectors @ (vectors.T @ products[:, :k])
            gap = float(values[k - 1].square() - values[k].square())
            if float(torch.linalg.matrix_norm(residual)) <= ANGLE_TOLERANCE * gap:
                if rank is not None and k > _numerical_rank(values, omega.width):
                    return None
                return Spectrum(_fix_signs(vectors[:, :k]), values[:k], energy)
        basis, _ = torch.linalg.qr(products)
    return None


def _ritz_rank(values: Tensor, energy: float, explained_variance: float | None, rank: int | None) -> int | None:
    """The rank that the Ritz values ask for; None if they hold too little, 0 if it is a tie."""
    if rank is not None:
        return rank
    assert explained_variance is not None
    shares = values.square().cumsum(0) / energy
    if bool(((shares - explained_variance).abs() < TIE_TOLERANCE).any()):
        return 0
    reached = shares >= explained_variance
    return int(reached.int().argmax()) + 1 if bool(reached.any()) else None


def _fix_signs(vectors: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """Make each column's largest entry positive, so that equal subspaces are saved equal."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def signature(positive: Float[Tensor, "n d"], negative: Float[Tensor, "n d"], *, centered: bool = False) -> float:
    """Return how much a layer's activations covary with the label positive / negative.

    The sum of the singular values of X^T Y / (2n), with X the (2n, d) stacked activations and Y the (2n, 2)
    one-hot labels (Qiu et al. 2024, arXiv 2405.09719, section on signatures); with ``centered``, of
    (X - mean X)^T (Y - mean Y) / (2n), which is ||mean(H+) - mean(H-)|| / sqrt(8) for equal counts.

    Example:
        >>> import torch
        >>> signature(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        2.0
    """
    activations = torch.cat([positive, negative]).double()
    labels = torch.zeros(activations.shape[0], 2, dtype=torch.float64, device=activations.device)
    labels[: positive.shape[0], 0] = 1
    labels[positive.shape[0] :, 1] = 1
    if centered:
        activations = activations - activations.mean(0)
        labels = labels - labels.mean(0)
    return float(torch.linalg.svdvals(activations.T @ labels / activations.shape[0]).sum())
