"""Streaming cross-covariance between two sets of activations, combinable across workers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.errors import ActivationError


@dataclass(frozen=True)
class CrossCovarianceMatrix:
    """Omega = X^T Y / n, held as its two factors when n < d and as a (d, d) matrix otherwise.

    Holding the factors costs 2 n d numbers in place of d^2, and every product with a thin matrix
    4 n d flops a column in place of 2 d^2 (design decision: never form d x d while n is small).

    Attributes:
        left: ``X / n``, (n, d) float64, or None when ``dense`` is held.
        right: ``Y``, (n, d) float64, or None when ``dense`` is held.
        dense: Omega, (d, d) float64, or None when the factors are held.
    """

    left: Float[Tensor, "n d"] | None
    right: Float[Tensor, "n d"] | None
    dense: Float[Tensor, "d d"] | None

    @property
    def rank_bound(self) -> int:
        """The largest rank Omega can have, min(n, d)."""
        factor = self.dense if self.left is None else self.left
        assert factor is not None
        return factor.shape[0]

    @property
    def width(self) -> int:
        """d, the number of features."""
        factor = self.dense if self.left is None else self.left
        assert factor is not None
        return factor.shape[1]

    def multiply(self, vectors: Float[Tensor, "d b"]) -> Float[Tensor, "d b"]:
        """Return Omega @ vectors."""
        if self.left is not None and self.right is not None:
            return self.left.T @ (self.right @ vectors)
        assert self.dense is not None
        return self.dense @ vectors

    def transpose_multiply(self, vectors: Float[Tensor, "d b"]) -> Float[Tensor, "d b"]:
        """Return Omega^T @ vectors."""
        if self.left is not None and self.right is not None:
            return self.right.T @ (self.left @ vectors)
        assert self.dense is not None
        return self.dense.T @ vectors

    def energy(self) -> float:
        """Return ||Omega||_F^2, the sum of all squared singular values.

        From the factors it is sum((X X^T) * (Y Y^T)) / n^2, so that no (d, d) matrix is formed.
        """
        if self.left is not None and self.right is not None:
            return float(((self.left @ self.left.T) * (self.right @ self.right.T)).sum())
        assert self.dense is not None
        return float(self.dense.square().sum())


class CrossCovariance:
    """Accumulates Omega = X^T Y / n batch by batch; centred, (X - mean X)^T (Y - mean Y) / n.

    The covariance is the same, up to float64 rounding, for any split into batches and any order of
    merging (definition: Qiu et al. 2024, arXiv 2405.09719, eq. 1). Rows are kept while fewer than d have
    been seen and folded into a (d, d) sum from then on, so memory stays below ``3 d^2`` float64.

    Args:
        width: d, the number of features of both sides.
        centered: subtract each side's own mean over the n rows.

    Example:
        >>> import torch
        >>> x, y = torch.randn(5, 3), torch.randn(5, 3)
        >>> covariance = CrossCovariance(3)
        >>> covariance.update(x[:2], y[:2])
        >>> covariance.update(x[2:], y[2:])
        >>> omega = covariance.compute().dense
        >>> torch.allclose(omega, x.double().T @ y.double() / 5)
        True
    """

    def __init__(self, width: int, *, centered: bool = False) -> None:
        self.width = width
        self.centered = centered
        self.count = 0
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._products: Tensor | None = None
        self._sums = torch.zeros(2, width, dtype=torch.float64)

    def update(self, x: Float[Tensor, "b d"], y: Float[Tensor, "b d"]) -> None:
        """Add ``b`` rows of both sides.

        Raises:
            ActivationError: the two sides differ in shape, or are not ``width`` wide.
        """
        if x.shape != y.shape or x.shape[-1] != self.width:
            raise ActivationError(
                f"both sides must be (b, {self.width}), got {tuple(x.shape)} and {tuple(y.shape)}; "
                "collect them from the same site with the same demonstrations"
            )
        x, y = x.detach().double(), y.detach().double()
        self.count += x.shape[0]
        self._sums = self._sums.to(x.device) + torch.stack([x.sum(0), y.sum(0)])
        self._rows.append((x, y))
        if self._products is not None or self.count >= self.width:
            self._fold()

    def _fold(self) -> None:
        """Turn the kept rows into a sum of products."""
        for x, y in self._rows:
            product = x.T @ y
            self._products = product if self._products is None else self._products + product
        self._rows = []

    def merge(self, other: CrossCovariance) -> None:
        """Add what another accumulator, for example another worker's, has seen.

        Raises:
            ActivationError: the two differ in width or in centring.
        """
        if (other.width, other.centered) != (self.width, self.centered):
            raise ActivationError(
                f"cannot merge a covariance of width {other.width} (centered={other.centered}) into one of "
                f"width {self.width} (centered={self.centered}); build both with the same settings"
            )
        self.count += other.count
        self._sums = self._sums + other._sums.to(self._sums.device)
        self._rows.extend(other._rows)
        if other._products is not None:
            self._products = other._products if self._products is None else self._products + other._products
        if self._products is not None or self.count >= self.width:
            self._fold()

    def compute(self) -> CrossCovarianceMatrix:
        """Return Omega over all rows seen so far.

        Raises:
            ActivationError: no rows have been seen.
        """
        if self.count == 0:
            raise ActivationError("a cross-covariance needs at least one row, got 0; call update first")
        mean_x, mean_y = self._sums / self.count
        if self._products is not None:
            dense = self._products / self.count
            if self.centered:
                dense = dense - torch.outer(mean_x, mean_y)
            return CrossCovarianceMatrix(None, None, dense)
        x = torch.cat([row[0] for row in self._rows])
        y = torch.cat([row[1] for row in self._rows])
        if self.centered:
            x, y = x - mean_x, y - mean_y
        return CrossCovarianceMatrix(x / self.count, y, None)
