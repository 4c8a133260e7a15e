"""A linear edit of one layer as a change of low rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.edits.record import EditSettings
from sealign.spectral.projection import COMBINATION_WEIGHTS, Projection


@dataclass(frozen=True)
class LinearChange:
    """A linear edit of one layer: x' = x + scale x + left (right x) + shift.

    Attributes:
        left: (d, r).
        right: (r, d).
        scale: 0 where the change is of rank r.
        shift: (d,), of a centred edit; None where there is none.
    """

    left: Float[Tensor, "d r"]
    right: Float[Tensor, "r d"]
    scale: float
    shift: Float[Tensor, " d"] | None

    @property
    def rank(self) -> int:
        """R."""
        return self.left.shape[1]

    def __call__(self, columns: Float[Tensor, "d m"]) -> Float[Tensor, "d m"]:
        """Return what the change adds to columns, without the shift."""
        return self.scale * columns + self.left @ (self.right @ columns)


def linear_change(projection: Projection, settings: EditSettings) -> LinearChange:
    """Return a layer's edit at its strength as a linear change, without rescaling.

    With z = x - mu and (a, b, c) the weights of the combination, x' = x + s (a z + b U+ U+^T z + c U- U-^T z).

    Args:
        projection: of the layer, without a feature map.
        settings: of the edit.

    Example:
        >>> import torch
        >>> e = torch.eye(3)
        >>> projection = Projection(e[:, :1], e[:, 1:2], None, "identity", e[0, :1], e[0, :1], 1.0, 1.0)
        >>> change = linear_change(projection, EditSettings("mlp", "both", "none", 1.0, "identity", False))
        >>> change(torch.tensor([[1.0], [2.0], [3.0]]).double()).flatten().tolist()
        [1.0, -2.0, 0.0]
    """
    scale, keep, drop = (settings.strength * weight for weight in COMBINATION_WEIGHTS[settings.combine])
    parts = [(weight, f.double().cpu()) for weight, f in ((keep, projection.positive), (drop, projection.negative))]
    used = [(weight, factor) for weight, factor in parts if weight] or [(0.0, parts[0][1][:, :0])]
    left = torch.cat([weight * factor for weight, factor in used], dim=1)
    right = torch.cat([factor for _, factor in used], dim=1).T
    change = LinearChange(left, right, scale, None)
    if projection.mean is None:
        return change
    return LinearChange(left, right, scale, -change(projection.mean.double().cpu()[:, None])[:, 0])
