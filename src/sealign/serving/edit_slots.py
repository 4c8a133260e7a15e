"""SiteBank: many edits of one module in buffers that stay where they are, and one of them chosen for each token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sealign.edits.record import EditSettings
from sealign.spectral.feature_maps import get_feature_map
from sealign.spectral.projection import COMBINATION_WEIGHTS, Projection

_NONLINEAR_WEIGHTS = {
    "both": (1.0, 1.0, 1.0),
    "positive": (1.0, 0.0, 0.0),
    "negative": (0.0, 1.0, 0.0),
    "average": (0.5, 0.5, 0.0),
    "reversed": (1.0, 1.0, 1.0),
}
"""With a feature map y = a kept + b dropped - c Phi^-1(mu), the last where centred: (a, b, c) by combination."""


@dataclass(frozen=True)
class BankSize:
    """How much room an edit bank has.

    Attributes:
        edits: how many edits it holds at once, at least 1.
        rank: the largest k+ + k- of a layer, at least 1.
        feature_maps: names of the maps, other than the identity, that its edits may use.
    """

    edits: int
    rank: int
    feature_maps: tuple[str, ...] = ()


class SiteBank:
    """The edits of one module: all their factors side by side, and for each slot what picks its own.

    With F the (d, slots r) matrix of all factors and w the row of a token's slot, which is zero outside that slot's own
    columns, a linear edit is x + a z + F (w * (F^T z)), z = x - mu: the same operations whatever the tokens ask for, so
    that a graph which was captured once serves every batch. Slot 0 is no edit.

    Args:
        width: d.
        size: how much room it has.
        device: of the buffers, which are float32.
    """

    def __init__(self, width: int, size: BankSize, device: torch.device) -> None:
        slots, columns = size.edits + 1, (size.edits + 1) * size.rank
        self._rank = size.rank
        self._maps = size.feature_maps

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        self._factors = zeros(width, columns)
        self._linear = zeros(slots, columns)
        self._positive = zeros(slots, columns)
        self._negative = zeros(slots, columns)
        self._mean = zeros(slots, width)
        # For each slot: strength, whether rescaled and a; number of the map, and the weights of its three parts.
        self._settings = zeros(slots, 3)
        self._map = zeros(slots, 1)
        self._parts = zeros(3, slots, 1)

    def load(self, slot: int, projection: Projection, settings: EditSettings) -> None:
        """Write one edit's factors into a slot; the buffers keep their addresses."""
        self.clear(slot)
        if settings.combine == "reversed" and settings.feature_map != "identity":
            projection = projection.reversed()
        start = slot * self._rank
        middle, end = start + projection.rank_positive, start + projection.rank_positive + projection.rank_negative
        self._factors[:, start:middle] = projection.positive
        self._factors[:, middle:end] = projection.negative
        if projection.mean is not None:
            self._mean[slot] = projection.mean
        self._settings[slot, 0] = settings.strength
        self._settings[slot, 1] = float(settings.normalization == "token")
        if settings.feature_map == "identity":
            scale, keep, drop = COMBINATION_WEIGHTS[settings.combine]
            self._settings[slot, 2] = scale
            self._linear[slot, start:middle] = keep
            self._linear[slot, middle:end] = drop
            return
        self._map[slot] = 1.0 + self._maps.index(settings.feature_map)
        self._positive[slot, start:middle] = 1.0
        self._negative[slot, middle:end] = 1.0
        kept, dropped, origin = _NONLINEAR_WEIGHTS[settings.combine]
        weights = (kept, dropped, origin if projection.mean is not None else 0.0)
        self._parts[:, slot, 0] = torch.tensor(weights, device=self._parts.device)

    def clear(self, slot: int) -> None:
        """Make a slot edit nothing."""
        columns = slice(slot * self._rank, (slot + 1) * self._rank)
        self._factors[:, columns] = 0.0
        for buffer in (self._linear, self._positive, self._negative, self._mean, self._settings, self._map):
            buffer[slot] = 0.0
        self._parts[:, slot] = 0.0

    def __call__(self, tokens: Float[Tensor, "t d"], slots: Int[Tensor, " t"]) -> Float[Tensor, "t d"]:
        """Return each token as its slot edits it, in the type it came in; those of slot 0 bit for bit.

        Args:
            tokens: activations; computed in float32.
            slots: of each token.
        """
        x = tokens.float()
        strength, rescaled, scale = torch.split(self._settings[slots], 1, dim=-1)
        mean = self._mean[slots]
        z = x - mean
        y = torch.addmm(x + scale * z, (z @ self._factors).mul_(self._linear[slots]), self._factors.T)
        for number, name in enumerate(self._maps, start=1):
            y = torch.where(self._map[slots] == number, self._nonlinear(name, x, mean, slots), y)
        before, after = (torch.linalg.vector_norm(part, dim=-1, keepdim=True) for part in (x, y))
        # Where y is zero it stays so, at whatever ratio that is finite.
        ratio = torch.lerp(torch.ones_like(before), before / after.clamp_min(1e-20), rescaled)
        edited = torch.lerp(x, y * ratio, strength)
        return torch.where(slots[:, None] > 0, edited.to(tokens.dtype), tokens)

    def _nonlinear(self, name: str, x: Tensor, mean: Tensor, slots: Tensor) -> Tensor:
        phi = get_feature_map(name)
        features = phi.forward(x) - mean
        along = features @ self._factors
        kept = phi.inverse(mean + (along * self._positive[slots]) @ self._factors.T, x)
        dropped = phi.inverse(mean + features - (along * self._negative[slots]) @ self._factors.T, x)
        weights = self._parts[:, slots]
        return weights[0] * kept + weights[1] * dropped - weights[2] * phi.inverse(mean, x)
