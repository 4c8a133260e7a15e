"""LayerStatistics: everything that a fit needs to know about one layer, accumulated batch by batch and over workers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.errors import ActivationError
from sealign.fitting.workers import gather_rows, sum_over_workers
from sealign.spectral.cross_covariance import CrossCovariance
from sealign.spectral.feature_maps import get_feature_map
from sealign.spectral.signature import signature_of_means

SAMPLE = 1000
"""Maximum number of neutral rows that are kept to measure how much an edit changes them."""

ROWS_AT_A_TIME = 512
"""Number of rows that are converted to float64 together."""


class LayerStatistics:
    """Accumulator of one layer: Omega+ and Omega-, the means of H+ and H-, and a sample of the rows of H.

    Omega+ = Phi(H)^T Phi(H+) / n and Omega- = Phi(H)^T Phi(H-) / n (Qiu et al. 2024, arXiv 2405.09719, section 3). The
    result is the same, up to float64 rounding, for any split into batches and workers.

    Args:
        width: Number of features d.
        centered: Whether to subtract each matrix's own mean, after the feature map.
        feature_map: Name of Phi.
        out: Tensors of zeros for H^T H+ and H^T H-, (d, d) float64 each, such as memory-mapped files. New tensors are
            allocated where None.

    Attributes:
        positive: Accumulator of Omega+.
        negative: Accumulator of Omega-.
        neutral_sample: The first ``SAMPLE`` rows of H, (m, d).

    Example:
        >>> import torch
        >>> statistics = LayerStatistics(3)
        >>> statistics.update(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, 3))
        >>> statistics.count
        2
    """

    def __init__(
        self,
        width: int,
        *,
        centered: bool = False,
        feature_map: str = "identity",
        out: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        self.centered = centered
        self.feature_map = feature_map
        self.positive: CrossCovariance = CrossCovariance(width, centered=centered, out=out[0])
        self.negative: CrossCovariance = CrossCovariance(width, centered=centered, out=out[1])
        self.neutral_sample: Tensor = torch.zeros(0, width)
        self._phi = get_feature_map(feature_map)
        self._combined = False
        self._sums = torch.zeros(2, width, dtype=torch.float64)

    @property
    def width(self) -> int:
        """Number of features d."""
        return self.positive.width

    @property
    def count(self) -> int:
        """Number n of demonstrations that have been added."""
        return self.positive.count

    def update(
        self, neutral: Float[Tensor, "b d"], positive: Float[Tensor, "b d"], negative: Float[Tensor, "b d"]
    ) -> None:
        """Add the rows of some demonstrations.

        Args:
            neutral, positive, negative: Rows of H, H+ and H-, (b, d) each, in any float type.

        Raises:
            ActivationError: Shapes differ, or an entry is NaN or infinite; names the row.
        """
        _check_rows(neutral, positive, negative)
        for rows in zip(
            *(torch.split(matrix, ROWS_AT_A_TIME) for matrix in (neutral, positive, negative)), strict=True
        ):
            # Phi is evaluated in float64, so that a float32 fit makes the same decisions as a float64 one.
            h, h_positive, h_negative = (matrix.detach().double() for matrix in rows)
            features = self._phi.forward(h)
            self.positive.update(features, self._phi.forward(h_positive))
            self.negative.update(features, self._phi.forward(h_negative))
            self._sums = self._sums.to(h.device) + torch.stack([h_positive.sum(0), h_negative.sum(0)])
        missing = SAMPLE - self.neutral_sample.shape[0]
        if missing > 0:
            self.neutral_sample = torch.cat([self.neutral_sample.to(neutral), neutral[:missing].detach()])

    def state(self) -> dict[str, Tensor]:
        """Return everything that has been accumulated by name, without copying the sums; ``restore`` reads it."""
        sides = {"positive": self.positive, "negative": self.negative}
        parts = {f"{side}.{name}": tensor for side, own in sides.items() for name, tensor in own.state().items()}
        return {**parts, "sums": self._sums, "neutral_sample": self.neutral_sample}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Replace everything that has been accumulated by a ``state``.

        Args:
            state: Tensors that ``state`` returned; they are copied.
        """
        for side, covariance in (("positive", self.positive), ("negative", self.negative)):
            covariance.restore({name: state[f"{side}.{name}"] for name in ("count", "sums", "products")})
        self._sums = state["sums"].clone()
        self.neutral_sample = state["neutral_sample"].to(self.neutral_sample, copy=True)

    def combine(self) -> None:
        """Combine the accumulators of all workers, so that each has the result; a second call does nothing.

        All workers must call it together.

        Raises:
            WorkerError: Another worker has exited.
        """
        if self._combined:
            return
        self._combined = True
        for covariance in (self.positive, self.negative):
            covariance.combine(sum_over_workers, gather_rows)
        self._sums = sum_over_workers(self._sums)
        self.neutral_sample = gather_rows(self.neutral_sample)[:SAMPLE]

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """Mean of Phi(H), (d,) float64."""
        return self.positive.mean_left

    @property
    def mean_positive(self) -> Float[Tensor, " d"]:
        """Mean of H+, (d,) float64."""
        return self._sums[0] / self.count

    @property
    def mean_negative(self) -> Float[Tensor, " d"]:
        """Mean of H-, (d,) float64."""
        return self._sums[1] / self.count

    @property
    def signature(self) -> float:
        """How strongly the activations covary with the label; see ``sealign.spectral.layer_signature``."""
        return signature_of_means(self.mean_positive, self.mean_negative, centered=self.centered)


def _check_rows(neutral: Tensor, positive: Tensor, negative: Tensor) -> None:
    shapes = [tuple(matrix.shape) for matrix in (neutral, positive, negative)]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2:
        raise ActivationError(
            f"neutral, positive and negative must be three (n, d) matrices of one shape, got {shapes}; collect them "
            "from the same demonstrations"
        )
    for name, matrix in (("neutral", neutral), ("positive", positive), ("negative", negative)):
        finite = torch.isfinite(matrix).all(dim=1)
        if not bool(finite.all()):
            row = int((~finite).int().argmax())
            raise ActivationError(f"NaN or infinity in row {row} of the {name} activations; leave that row out")
