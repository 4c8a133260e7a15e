"""CrossCovariance: cross-covariance of two sets of activations, accumulated batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.errors import ActivationError
from sealign.spectral.cross_covariance_matrix import CovarianceFactor, CrossCovarianceMatrix


class CrossCovariance:
    """Accumulator of the cross-covariance Omega = X^T Y / n; centred, (X - mean X)^T (Y - mean Y) / n.

    The result is the same, up to float64 rounding, for any split into batches and among workers (definition: Qiu
    et al. 2024, arXiv 2405.09719, eq. 1). Rows are stored until d of them have been added; from then on they are
    reduced to a (d, d) sum of products, so that memory stays below ``3 d^2`` float64 numbers.

    Args:
        width: Number of features d of both sides.
        centered: Whether to subtract the mean over the n rows from each side.
        out: Tensor of zeros, (d, d) float64, to accumulate the products in, such as a memory-mapped file. A new tensor
            is allocated if None.

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

    def __init__(self, width: int, *, centered: bool = False, out: Float[Tensor, "d d"] | None = None) -> None:
        self._out = out
        self.width = width
        self.centered = centered
        self.count: int = 0
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._products: Tensor | None = None
        self._sums = torch.zeros(2, width, dtype=torch.float64)

    def update(self, x: Float[Tensor, "b d"], y: Float[Tensor, "b d"]) -> None:
        """Add a batch of rows.

        Args:
            x: Rows of X, (b, d) in any float type and on any device.
            y: The rows of Y that belong to them, (b, d).

        Raises:
            ActivationError: The two sides differ in shape, or do not have ``width`` columns.
        """
        if x.shape != y.shape or x.shape[-1] != self.width:
            raise ActivationError(
                f"both sides must have shape (b, {self.width}), got {tuple(x.shape)} and {tuple(y.shape)}; "
                "collect them from the same site with the same demonstrations"
            )
        x, y = x.detach().double(), y.detach().double()
        self.count += x.shape[0]
        self._sums = self._sums.to(x.device) + torch.stack([x.sum(0), y.sum(0)])
        self._rows.append((x, y))
        if self._products is not None or self.count >= self.width:
            self._reduce_rows()

    def _reduce_rows(self) -> None:
        """Reduce the stored rows to a sum of products."""
        if self._products is None:
            device = self._sums.device
            self._products = (
                torch.zeros(self.width, self.width, dtype=torch.float64, device=device)
                if self._out is None
                else self._out
            )
        for x, y in self._rows:
            self._products.addmm_(x.T, y)
        self._rows = []

    def combine(self, sum_tensors: Callable[[Tensor], Tensor], gather_rows: Callable[[Tensor], Tensor]) -> None:
        """Combine the accumulators of all workers, so that each worker has the result.

        All workers must call it together. Rows are gathered if the workers have fewer than d in total; otherwise
        the sums of products are added.

        Args:
            sum_tensors: Function that returns the sum of a tensor over all workers.
            gather_rows: Function that returns the rows of all workers, (b, d) each, as one (n, d) tensor.

        Example:
            >>> import torch
            >>> covariance = CrossCovariance(3)
            >>> covariance.update(torch.ones(1, 3), torch.ones(1, 3))
            >>> covariance.combine(lambda tensor: 2 * tensor, lambda rows: torch.cat([rows, rows]))  # two equal workers
            >>> covariance.count
            2
        """
        total = sum_tensors(torch.tensor([self.count, int(self._products is not None)]))
        self.count = int(total[0])
        self._sums = sum_tensors(self._sums)
        if int(total[1]) or self.count >= self.width:
            self._reduce_rows()
            assert self._products is not None
            self._products = sum_tensors(self._products)
        else:
            x, y = self._stored_rows()
            self._rows = [(gather_rows(x), gather_rows(y))]

    def state(self) -> dict[str, Tensor]:
        """Return the accumulated count and sums by name, without copying them; ``restore`` reads them."""
        self._reduce_rows()
        assert self._products is not None
        return {"count": torch.tensor(self.count), "sums": self._sums, "products": self._products}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Replace all that has been accumulated by a ``state``.

        Args:
            state: Tensors that ``state`` returned; they are copied.
        """
        self._rows = []
        self.count = int(state["count"])
        self._sums = state["sums"].clone()
        self._products = state["products"].clone() if self._out is None else self._out.copy_(state["products"])

    @property
    def mean_left(self) -> Float[Tensor, " d"]:
        """Mean of the rows of X, (d,) float64."""
        return self._sums[0] / self.count

    def _stored_rows(self) -> tuple[Tensor, Tensor]:
        if not self._rows:
            none = torch.zeros(0, self.width, dtype=torch.float64)
            return none, none
        if len(self._rows) > 1:
            self._rows = [(torch.cat([row[0] for row in self._rows]), torch.cat([row[1] for row in self._rows]))]
        return self._rows[0]

    def compute(self, *, left: CovarianceFactor | None = None) -> CrossCovarianceMatrix:
        """Return Omega over all rows that have been added.

        Args:
            left: ``left`` of the result for another Y with the same X, so that its Gram matrix is computed once. If
                None, the factor is computed from the rows.

        Raises:
            ActivationError: No rows have been added.
        """
        if self.count == 0:
            raise ActivationError("a cross-covariance needs at least one row, got 0; call update first")
        mean_x, mean_y = self._sums / self.count
        if self._products is not None:
            dense = self._products / self.count
            if self.centered:
                dense = dense - torch.outer(mean_x, mean_y)
            return CrossCovarianceMatrix(None, None, dense)
        x, y = self._stored_rows()
        if self.centered:
            x, y = x - mean_x, y - mean_y
        return CrossCovarianceMatrix(left or CovarianceFactor(x), CovarianceFactor(y), None)

    def difference(self, other: CrossCovariance) -> CrossCovarianceMatrix:
        """Return Omega - Omega' = X^T (Y - Y') / n, for another Y' with the same X.

        Args:
            other: Accumulator of the rows of X and Y', in the same order, with the same width and centring.

        Raises:
            ActivationError: No rows have been added, or the two differ in number, width or centring.

        Example:
            >>> import torch
            >>> x, y = torch.randn(2, 3), torch.randn(2, 3)
            >>> first, second = CrossCovariance(3), CrossCovariance(3)
            >>> first.update(x, y + 1)
            >>> second.update(x, y)
            >>> torch.allclose(first.difference(second).matrix, x.double().T @ torch.ones(2, 3).double() / 2)
            True
        """
        own, others = ((each.width, each.centered, each.count) for each in (self, other))
        if own != others:
            raise ActivationError(
                f"width, centring and number of rows are {own} and {others}; a difference needs two sides of the same "
                "demonstrations"
            )
        first, second = self.compute(), other.compute()
        if first.left is None or first.right is None or second.right is None:
            return CrossCovarianceMatrix(None, None, first.matrix - second.matrix)
        return CrossCovarianceMatrix(first.left, CovarianceFactor(first.right.values - second.right.values), None)
