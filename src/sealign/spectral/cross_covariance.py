"""Streaming cross-covariance between two sets of activations, combinable across workers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.errors import ActivationError
from sealign.fitting.workers import gather_rows, sum_everywhere
from sealign.spectral.cross_covariance_matrix import CrossCovarianceMatrix, Rows


class CrossCovariance:
    """Accumulates Omega = X^T Y / n batch by batch; centred, (X - mean X)^T (Y - mean Y) / n.

    The covariance is the same, up to float64 rounding, for any split into batches and any order of
    merging (definition: Qiu et al. 2024, arXiv 2405.09719, eq. 1). Rows are kept while fewer than d have
    been seen and folded into a (d, d) sum from then on, so memory stays below ``3 d^2`` float64.

    Args:
        width: d, the number of features of both sides.
        centered: subtract each side's own mean over the n rows.
        into: zeros in float64 that products are added into, as those of a mapped file; made if None.

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

    def __init__(self, width: int, *, centered: bool = False, into: Float[Tensor, "d d"] | None = None) -> None:
        self._into = into
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
        if self._products is None:
            device = self._sums.device
            self._products = (
                torch.zeros(self.width, self.width, dtype=torch.float64, device=device)
                if self._into is None
                else self._into
            )
        for x, y in self._rows:
            self._products.addmm_(x.T, y)
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
        if other._products is not None or self._products is not None or self.count >= self.width:
            self._fold()
        if other._products is not None and self._products is not None:
            self._products.add_(other._products)

    def combine(self) -> None:
        """Add up what all workers have seen, on every worker; nothing where there is one.

        Every worker calls it. While fewer than d rows have been seen in all, rows are gathered, else products added.
        """
        total = sum_everywhere(torch.tensor([self.count, int(self._products is not None)]))
        self.count = int(total[0])
        self._sums = sum_everywhere(self._sums)
        if int(total[1]) or self.count >= self.width:
            self._fold()
            assert self._products is not None
            self._products = sum_everywhere(self._products)
        else:
            x, y = self._rows_seen()
            self._rows = [(gather_rows(x), gather_rows(y))]

    def state(self) -> dict[str, Tensor]:
        """Return all that has been added, as sums that are not copied; ``restore`` reads it."""
        self._fold()
        assert self._products is not None
        return {"count": torch.tensor(self.count), "sums": self._sums, "products": self._products}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a ``state``, in place of what has been added."""
        self._rows = []
        self.count = int(state["count"])
        self._sums = state["sums"].clone()
        self._products = state["products"].clone() if self._into is None else self._into.copy_(state["products"])

    @property
    def mean_left(self) -> Float[Tensor, " d"]:
        """The mean of the rows of X."""
        return self._sums[0] / self.count

    def _rows_seen(self) -> tuple[Tensor, Tensor]:
        if not self._rows:
            none = torch.zeros(0, self.width, dtype=torch.float64)
            return none, none
        if len(self._rows) > 1:
            self._rows = [(torch.cat([row[0] for row in self._rows]), torch.cat([row[1] for row in self._rows]))]
        return self._rows[0]

    def compute(self, *, left: Rows | None = None) -> CrossCovarianceMatrix:
        """Return Omega over all rows seen so far.

        Args:
            left: that of another covariance of the same X, so that its Gram matrix is made once.

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
        x, y = self._rows_seen()
        if self.centered:
            x, y = x - mean_x, y - mean_y
        return CrossCovarianceMatrix(left or Rows(x), Rows(y), None)
