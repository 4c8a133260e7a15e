"""The model run over demonstrations: one activation vector a demonstration, role and layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sealign.spectral.signature import signature


@dataclass(frozen=True)
class Activations:
    """Activations of n demonstrations at one site, by layer.

    Attributes:
        site: where they were read.
        neutral, positive, negative: layer -> (n, d) float32, on the CPU; row i is demonstration i.
    """

    site: str
    neutral: Mapping[int, Float[Tensor, "n d"]]
    positive: Mapping[int, Float[Tensor, "n d"]]
    negative: Mapping[int, Float[Tensor, "n d"]]


def layer_signatures(activations: Activations, *, centered: bool = False) -> dict[int, float]:
    """Return the signature of each collected layer; see ``sealign.spectral.signature.signature``.

    Args:
        activations: Activations of the demonstrations.
        centered: Whether the means are subtracted.
    """
    return {
        layer: signature(activations.positive[layer], activations.negative[layer], centered=centered)
        for layer in sorted(activations.positive)
    }
