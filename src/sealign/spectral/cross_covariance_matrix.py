"""Omega, the cross-covariance of two sets of activations, as its factors or as a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

GRAM_COLUMNS = 2048
"""Columns of a Gram product in float32, after which it is added up in float64."""

GRAM_ROWS = 256
"""Rows of a Gram product at a time, so that what is above the diagonal is not computed."""

GRAM_ERROR = 1e-7
"""Largest error of an entry of a Gram matrix over the product of the norms of its two rows; measured, see the tests."""


class Rows:
    """The n rows of one side of a covariance, and their Gram matrix in float32, made when it is first asked for.

    Args:
        values: (n, d) float64.

    Example:
        >>> import torch
        >>> Rows(torch.tensor([[3.0, 4.0], [0.0, 8.0]], dtype=torch.float64)).gram * 64
        tensor([[25., 32.],
                [32., 64.]])
    """

    def __init__(self, values: Float[Tensor, "n d"]) -> None:
        self.values = values

    @cached_property
    def scale(self) -> float:
        """The largest absolute value, by which the rows are divided so that no square leaves float32."""
        return _largest(self.values)

    @cached_property
    def gram(self) -> Float[Tensor, "n n"]:
        """X X^T / scale^2 in float32: half the time of float64, and half of that again since it is symmetric."""
        exact = torch.get_float32_matmul_precision() == "highest"  # else float32 products round to fewer digits
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
    """Omega = X^T Y / n, held as its two factors when n < d and as a (d, d) matrix otherwise.

    Holding the factors costs 2 n d numbers in place of d^2, and every product with a thin matrix
    4 n d flops a column in place of 2 d^2 (design decision: never form d x d while n is small).

    Attributes:
        left: X, or None when ``dense`` is held.
        right: Y, or None when ``dense`` is held.
        dense: Omega, (d, d) float64, or None when the factors are held.
    """

    left: Rows | None
    right: Rows | None
    dense: Float[Tensor, "d d"] | None

    @property
    def factors(self) -> tuple[Rows, Rows] | None:
        """Both factors, or None when ``dense`` is held."""
        return None if self.left is None or self.right is None else (self.left, self.right)

    @property
    def matrix(self) -> Float[Tensor, "d d"]:
        """Omega itself, computed where the factors are held."""
        if self.factors is None:
            assert self.dense is not None
            return self.dense
        left, right = self.factors
        return left.values.T @ right.values / self.rank_bound

    @property
    def rank_bound(self) -> int:
        """The largest rank Omega can have, min(n, d)."""
        return self._held.shape[0]

    @property
    def width(self) -> int:
        """d, the number of features."""
        return self._held.shape[1]

    @property
    def device(self) -> torch.device:
        """Where it is held."""
        return self._held.device

    @cached_property
    def _single(self) -> Tensor:
        """The held matrix in float32 over its largest absolute value."""
        return self.matrix.div(self._unit**0.5).float()

    @cached_property
    def _unit(self) -> float:
        """What a squared singular value is that the scaled float32 matrices give as 1."""
        if self.factors is None:
            return _largest(self.matrix) ** 2
        left, right = self.factors
        return (left.scale * right.scale / self.rank_bound) ** 2

    @property
    def _held(self) -> Tensor:
        held = self.dense if self.left is None else self.left.values
        assert held is not None
        return held

    def multiply(self, vectors: Float[Tensor, "d b"]) -> Float[Tensor, "d b"]:
        """Return Omega @ vectors."""
        if self.factors is None:
            return (vectors.T @ self.matrix.T).T  # a few long rows are multiplied twice as fast as a few columns
        left, right = self.factors
        return ((vectors.T @ right.values.T) @ left.values).T / self.rank_bound

    def transpose_multiply(self, vectors: Float[Tensor, "d b"]) -> Float[Tensor, "d b"]:
        """Return Omega^T @ vectors."""
        if self.factors is None:
            return (vectors.T @ self.matrix).T
        left, right = self.factors
        return ((vectors.T @ left.values.T) @ right.values).T / self.rank_bound

    def energy(self) -> float:
        """Return ||Omega||_F^2, the sum of all squared singular values.

        From the factors it is sum((X X^T) * (Y Y^T)) / n^2, so that no (d, d) matrix is formed.
        """
        if self.factors is None:
            return float(self.matrix.square().sum())
        left, right = (rows.values for rows in self.factors)
        return float(((left @ left.T) * (right @ right.T)).sum()) / self.rank_bound**2

    def quick_energy(self) -> tuple[float, float]:
        """Return ``energy()`` from products in float32 and a bound of its error; itself and 0 where that is too much.

        It is itself where a (d, d) matrix is held, and where X and Y have so little in common that they cancel.
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

    def quick_rounds(
        self, columns: Float[Tensor, "r b"], rounds: int
    ) -> tuple[Float[Tensor, "r b"], Float[Tensor, " b"]]:
        """Return columns after subspace iteration in float32, orthonormal, and the singular values they come to, about.

        From the factors it iterates on the two (n, n) Gram matrices, since Omega Omega^T X^T c = X^T (Y Y^T) (X X^T) c,
        and otherwise on Omega Omega^T itself.

        Args:
            columns: b of them, r = min(n, d) long, in float32.
            rounds: of iteration, at least 1.
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

    def lift(self, columns: Float[Tensor, "r b"]) -> Float[Tensor, "d b"]:
        """Return an orthonormal block in float64 that spans the left vectors whose columns ``quick_rounds`` gives."""
        thin = columns.double()
        if self.factors is not None:
            thin = (thin.T @ self.factors[0].values).T
        basis: Tensor = torch.linalg.qr(thin)[0]
        return basis


def _largest(values: Tensor) -> float:
    """Return the largest absolute value, or 1 where all are 0."""
    low, high = values.aminmax()
    return float(torch.maximum(-low, high)) or 1.0
