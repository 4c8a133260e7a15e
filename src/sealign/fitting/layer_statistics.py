"""LayerStatistics: what a fit needs of one layer, added up row by row and combined across workers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.errors import ActivationError
from sealign.fitting.workers import gather_rows, sum_everywhere
from sealign.spectral.cross_covariance import CrossCovariance
from sealign.spectral.feature_maps import get_feature_map
from sealign.spectral.signature import signature_of_means

SAMPLE = 1000
"""Neutral rows that are kept, to say by how much an edit changes them."""


class LayerStatistics:
    """What a fit needs of one layer: Omega+ and Omega-, the sums of its rows, and a sample of the neutral ones.

    Omega+ = Phi(H)^T Phi(H+) / n and Omega- = Phi(H)^T Phi(H-) / n (Qiu et al. 2024, arXiv 2405.09719, section 3). They
    are the same up to rounding for any split into batches and workers.

    Args:
        width: d.
        centered: subtract each matrix's own mean, after the feature map.
        feature_map: the name of Phi.
        into: zeros in float64, (d, d) each, that the sums are added into; made where None.

    Attributes:
        positive, negative: the cross-covariances.
        neutral_sample: at most ``SAMPLE`` rows of H.

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
        into: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        self.centered = centered
        self.feature_map = feature_map
        self.positive = CrossCovariance(width, centered=centered, out=into[0])
        self.negative = CrossCovariance(width, centered=centered, out=into[1])
        self.neutral_sample = torch.zeros(0, width)
        self._phi = get_feature_map(feature_map)
        self._combined = False
        self._sums = torch.zeros(2, width, dtype=torch.float64)

    @property
    def width(self) -> int:
        """D."""
        return self.positive.width

    @property
    def count(self) -> int:
        """n, the demonstrations that were added."""
        return self.positive.count

    def update(
        self, neutral: Float[Tensor, "b d"], positive: Float[Tensor, "b d"], negative: Float[Tensor, "b d"]
    ) -> None:
        """Add the rows of some demonstrations.

        Raises:
            ActivationError: shapes differ, or NaN or infinity; says in which row.
        """
        _check_rows(neutral, positive, negative)
        # Phi is evaluated in float64, so that a float32 fit takes the same decisions as a float64 one.
        features = self._phi.forward(neutral.detach().double())
        sums = []
        for covariance, target in ((self.positive, positive), (self.negative, negative)):
            rows = target.detach().double()
            sums.append(rows.sum(0))
            covariance.update(features, self._phi.forward(rows))
        self._sums = self._sums.to(sums[0].device) + torch.stack(sums)
        missing = SAMPLE - self.neutral_sample.shape[0]
        if missing > 0:
            self.neutral_sample = torch.cat([self.neutral_sample.to(neutral), neutral[:missing].detach()])

    def state(self) -> dict[str, Tensor]:
        """Return by name the tensors of all that has been added, the sums not copied; ``restore`` reads it."""
        sides = {"positive": self.positive, "negative": self.negative}
        parts = {f"{side}.{name}": tensor for side, sum_ in sides.items() for name, tensor in sum_.state().items()}
        return {**parts, "sums": self._sums, "neutral_sample": self.neutral_sample}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a ``state``, in place of what has been added."""
        for side, covariance in (("positive", self.positive), ("negative", self.negative)):
            covariance.restore({name: state[f"{side}.{name}"] for name in ("count", "sums", "products")})
        self._sums = state["sums"].clone()
        self.neutral_sample = state["neutral_sample"].to(self.neutral_sample, copy=True)

    def combine(self) -> None:
        """Add up what all workers have seen, on every worker; nothing where there is one, or the second time."""
        if self._combined:
            return
        self._combined = True
        for covariance in (self.positive, self.negative):
            covariance.combine(sum_everywhere, gather_rows)
        self._sums = sum_everywhere(self._sums)
        self.neutral_sample = gather_rows(self.neutral_sample)[:SAMPLE]

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """The mean of Phi(H)."""
        return self.positive.mean_left

    @property
    def mean_positive(self) -> Float[Tensor, " d"]:
        """Mean of H+, in float64."""
        return self._sums[0] / self.count

    @property
    def mean_negative(self) -> Float[Tensor, " d"]:
        """Mean of H-, in float64."""
        return self._sums[1] / self.count

    @property
    def signature(self) -> float:
        """How much the activations covary with the label; see ``sealign.spectral.signature.signature``."""
        return signature_of_means(self.mean_positive, self.mean_negative, centered=self.centered)


def _check_rows(neutral: Tensor, positive: Tensor, negative: Tensor) -> None:
    shapes = [tuple(matrix.shape) for matrix in (neutral, positive, negative)]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2:
        raise ActivationError(
            f"neutral, positive and negative must be three (n, d) matrices of one shape, got {shapes}"
        )
    for name, matrix in (("neutral", neutral), ("positive", positive), ("negative", negative)):
        finite = torch.isfinite(matrix).all(dim=1)
        if not bool(finite.all()):
            row = int((~finite).int().argmax())
            raise ActivationError(f"NaN or infinity in row {row} of the {name} activations; leave that row out")
