"""CrossCovarianceMatrix: a cross-covariance Omega, stored as its two factors or as a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

GRAM_COLUMNS = 2048
"""Number of columns per float32 Gram product; the products are summed in float64."""

GRAM_ROWS = 256
"""Row block size; only the lower triangle is computed."""

GRAM_ERROR = 1e-7
"""Bound on the relative error of the energy contributed by each float32 Gram matrix (measured in the tests).

Single entries of a Gram matrix have up to 50 times this error, relative to the product of the norms of their two rows,
but these errors cancel in the sum.
"""


def _float32_is_exact() -> bool:
    """Return whether products in float32 have its precision; users of PyTorch may allow TF32 or bfloat16 instead."""
    # The older torch.get_float32_matmul_precision raises an error once these have been set.
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    return all(backend.fp32_precision in ("none", "ieee") for backend in backends)


class CovarianceFactor:
    """Factor X or Y of a cross-covariance, with its Gram matrix, which is computed on first use.

    Args:
        values: The n rows, (n, d) float64.

    Example:
        >>> import torch
        >>> CovarianceFactor(torch.tensor([[3.0, 4.0], [0.0, 8.0]], dtype=torch.float64)).gram * 64
        tensor([[25., 32.],
                [32., 64.]])
    """

    def __init__(self, values: Float[Tensor, "n d"]) -> None:
        self.values = values

    @cached_property
    def scale(self) -> float:
        """Largest absolute value; the rows are divided by it so that squares do not overflow float32."""
        return _largest(self.values)

    @cached_property
    def gram(self) -> Float[Tensor, "n n"]:
        """Scaled Gram matrix X X^T / scale^2, (n, n) float32.

        float32 is about twice as fast as float64, and symmetry halves the work again.
        """
        exact = _float32_is_exact()
        count, width = self.values.shape
        total = torch.zeros(count, count, dtype=torch.float64, device=self.values.device)
        for column in range(0, width, GRAM_COLUMNS):
            part = self.values[:, column : column + GRAM_COLUMNS]
            part = (part.float() if exact else part) / self.scale
            for row in range(0, count, GRAM_ROWS):
                block = slice(row, row + GRAM_ROWS)
                total[block, : row + GRAM_ROWS] += part[block] @ part[: row + GRAM_ROWS].T
        lower = total.float().tril()
        return lower + lower.tril(-1).T


@dataclass(frozen=True)
class CrossCovarianceMatrix:
    """Omega = X^T Y / n, stored as its two factors when n < d and as a (d, d) matrix otherwise.

    The factors hold 2 n d numbers, the matrix d^2. A product with a thin matrix takes 4 n d floating-point operations
    per column with the factors, 2 d^2 with the matrix. So the factors save memory and time if n < d / 2.

    Attributes:
        left: X, or None when ``dense`` is stored.
        right: Y, or None when ``dense`` is stored.
        dense: Omega, (d, d) float64, or None when the factors are stored.
    """

    left: CovarianceFactor | None
    right: CovarianceFactor | None
    dense: Float[Tensor, "d d"] | None

    @property
    def factors(self) -> tuple[CovarianceFactor, CovarianceFactor] | None:
        """Both factors, or None when ``dense`` is stored."""
        return None if self.left is None or self.right is None else (self.left, self.right)

    @property
    def matrix(self) -> Float[Tensor, "d d"]:
        """Omega as a (d, d) matrix; computed from the factors if the factors are stored."""
        if self.factors is None:
            assert self.dense is not None
            return self.dense
        left, right = self.factors
        return left.values.T @ right.values / self.rank_bound

    @property
    def rank_bound(self) -> int:
        """Upper bound of the rank of Omega: n if the factors are stored, d otherwise."""
        return self._stored.shape[0]

    @property
    def width(self) -> int:
        """Number of features d."""
        return self._stored.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self._stored.device

    @cached_property
    def _single(self) -> Tensor:
        """Omega divided by its largest absolute value, in float32."""
        return self.matrix.div(self._unit**0.5).float()

    @cached_property
    def _unit(self) -> float:
        """Scale factor from squared singular values of the scaled matrices to squared singular values of Omega."""
        if self.factors is None:
            return _largest(self.matrix) ** 2
        left, right = self.factors
        return (left.scale * right.scale / self.rank_bound) ** 2

    @property
    def _stored(self) -> Tensor:
        stored = self.dense if self.left is None else self.left.values
        assert stored is not None
        return stored

    def multiply(self, vectors: Float[Tensor, "d b"]) -> Float[Tensor, "d b"]:
        """Return Omega @ vectors, (d, b)."""
        if self.factors is None:
            return (vectors.T @ self.matrix.T).T  # a few rows are multiplied twice as fast as a few columns
        left, right = self.factors
        return ((vectors.T @ right.values.T) @ left.values).T / self.rank_bound

    def transpose_multiply(self, vectors: Float[Tensor, "d b"]) -> Float[Tensor, "d b"]:
        """Return Omega^T @ vectors, (d, b)."""
        if self.factors is None:
            return (vectors.T @ self.matrix).T
        left, right = self.factors
        return ((vectors.T @ left.values.T) @ right.values).T / self.rank_bound

    def energy(self) -> float:
        """Return ||Omega||_F^2, the sum of all squared singular values.

        With factors, it is computed as sum((X X^T) * (Y Y^T)) / n^2, so that no (d, d) matrix is formed.
        """
        if self.factors is None:
            return float(self.matrix.square().sum())
        left, right = (rows.values for rows in self.factors)
        return float(((left @ left.T) * (right @ right.T)).sum()) / self.rank_bound**2

    def approximate_energy(self) -> tuple[float, float]:
        """Return ``energy()`` computed from float32 products, and a bound on its error.

        The exact energy and an error of 0 are returned if Omega is stored as a (d, d) matrix, or if the error would
        exceed the energy because X and Y are almost uncorrelated.
        """
        if self.factors is None:
            return self.energy(), 0.0
        left, right = self.factors
        a, b = left.gram, right.gram
        size_a, size_b = (float(torch.linalg.matrix_norm(gram)) for gram in (a, b))
        total = float((a * b).sum(dtype=torch.float64))
        error = GRAM_ERROR * (float(a.trace()) * size_b + size_a * float(b.trace()))
        if total <= error:
            return self.energy(), 0.0
        return self._unit * total, self._unit * error

    def iterate_subspace(
        self, columns: Float[Tensor, "r b"], rounds: int
    ) -> tuple[Float[Tensor, "r b"], Float[Tensor, " b"]]:
        """Run subspace iteration in float32; return an orthonormal basis and approximate singular values.

        With factors, the iteration runs on the two (n, n) Gram matrices, since
        Omega Omega^T X^T c = X^T (Y Y^T) (X X^T) c; otherwise it runs on Omega Omega^T.

        Args:
            columns: Initial block, (r, b) float32 with r = ``rank_bound``.
            rounds: Number of iterations. Must be at least 1.
        """
        if self.factors is None:
            steps = self._single.T, self._single
        else:
            left, right = self.factors
            steps = left.gram, right.gram
        start = columns
        for _ in range(rounds):
            start, _ = torch.linalg.qr(columns)
            columns = (start.T @ steps[0].T @ steps[1].T).T
        values = torch.linalg.eigvals((start.T @ columns).double()).real.sort(descending=True).values
        return torch.linalg.qr(columns)[0], (values.clamp(min=0) * self._unit).sqrt()

    def lift_basis(self, columns: Float[Tensor, "r b"]) -> Float[Tensor, "d b"]:
        """Return an orthonormal basis, (d, b) float64, of the left singular subspace from ``iterate_subspace``.

        Args:
            columns: Basis that ``iterate_subspace`` returned, (r, b).
        """
        thin = columns.double()
        if self.factors is not None:
            thin = (thin.T @ self.factors[0].values).T
        basis: Tensor = torch.linalg.qr(thin)[0]
        return basis


def _largest(values: Tensor) -> float:
    """Return the largest absolute value, or 1 if all are 0."""
    low, high = values.aminmax()
    return float(torch.maximum(-low, high)) or 1.0
