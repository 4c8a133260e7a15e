"""Activations: what a model computed over demonstrations at one site, one vector for each demonstration and role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Activations:
    """Activations of n demonstrations at one site: H, H+ and H- of each layer.

    Attributes:
        site: Where they were read: ``mlp``, ``attention``, ``residual`` or ``heads``.
        neutral: H by layer, (n, d) float32 on the CPU; row i belongs to demonstration i.
        positive: H+ by layer.
        negative: H- by layer.
        text: Activations of every token of the bundled ordinary text by layer, (t, d) float32, if they were collected,
            too; a fit that needs them then need not.
    """

    site: str
    neutral: Mapping[int, Float[Tensor, "n d"]]
    positive: Mapping[int, Float[Tensor, "n d"]]
    negative: Mapping[int, Float[Tensor, "n d"]]
    text: Mapping[int, Float[Tensor, "t d"]] | None = None

    @property
    def layers(self) -> Sequence[int]:
        """The collected layers, in ascending order."""
        return sorted(self.neutral)

    def rows(self, layer: int) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"], Float[Tensor, "n d"]]:
        """Return H, H+ and H- of a layer, (n, d) each.

        Args:
            layer: A collected layer.
        """
        return self.neutral[layer], self.positive[layer], self.negative[layer]
