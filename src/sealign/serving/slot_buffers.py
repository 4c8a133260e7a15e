"""SlotBuffers: the edits of one module in buffers of fixed address, one edit selected for each token by its slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sealign.edits.affine_edit import AffineEdit
from sealign.edits.feature_map_edit import FeatureMapEdit
from sealign.edits.layer_edit import LayerEdit
from sealign.spectral.feature_maps import get_feature_map

_PART_WEIGHTS = {
    "both": (1.0, 1.0, 1.0),
    "positive": (1.0, 0.0, 0.0),
    "negative": (0.0, 1.0, 0.0),
    "average": (0.5, 0.5, 0.0),
    "reversed": (1.0, 1.0, 1.0),
}
"""Edits with a feature map as y = a kept + b dropped - c Phi^-1(mu), the last only if centred: (a, b, c)."""


@dataclass(frozen=True)
class SlotSizes:
    """Sizes of the slots of a served model.

    Attributes:
        edits: Number of edits that can be loaded at once. Must be at least 1.
        rank: Largest rank of an edit at one layer. Must be at least 1.
        feature_maps: Names of the feature maps, other than the identity, that edits may use.
    """

    edits: int
    rank: int
    feature_maps: tuple[str, ...] = ()


class SlotBuffers:
    """The edits of one module side by side in buffers whose addresses never change.

    The right factors of all slots stand side by side in the (d, c) matrix ``inner``, the left factors in the (c, d)
    matrix ``outer``. With m the row of a mask that is 1 in the columns of a token's slot and 0 elsewhere, the affine
    edit of the token is

        y = x + scale x + (m * (x inner)) outer + constant,        x' = x + strength (q y - x)

    with scale, constant part, strength and rescaling looked up by slot. So are the probe w and the threshold t of a
    gate: tokens with w . x <= t stay as they are; without a gate, w = 0 and t = -1. The operations are the same for
    every choice of slots and edits, so a graph that was captured once serves every batch. Slot 0 holds no edit.

    Args:
        width: Number of features d.
        sizes: Number of slots and size of each.
        device: Device of the buffers, which are float32.

    Example:
        >>> buffers = SlotBuffers(2, SlotSizes(edits=1, rank=1), torch.device("cpu"))
        >>> buffers.load(1, AffineEdit.constant(torch.tensor([1.0, 0.0])), 0.5)
        >>> buffers(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor([[0.0000, 0.0000],
                [0.5000, 0.0000]])
    """

    def __init__(self, width: int, sizes: SlotSizes, device: torch.device) -> None:
        slots, columns = sizes.edits + 1, sizes.edits * sizes.rank
        self._rank = sizes.rank
        self._maps = sizes.feature_maps

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        self._inner = zeros(width, columns)
        self._outer = zeros(columns, width)
        # By slot. Strength, whether y is rescaled (1 or 0), and scale are looked up together.
        self._settings = zeros(slots, 3)
        self._mask = zeros(slots, columns)
        self._constant = zeros(slots, width)
        self._probe = zeros(slots, width)
        self._threshold = zeros(slots, 1) - 1.0
        # By slot, for edits with a feature map: number of the map, masks of U+ and U-, mean, weights of the parts.
        self._map = zeros(slots, 1)
        self._positive = zeros(slots, columns)
        self._negative = zeros(slots, columns)
        self._mean = zeros(slots, width)
        self._weights = zeros(slots, 3)

    def load(self, slot: int, layer_edit: LayerEdit, strength: float) -> None:
        """Write an edit into a slot in place of what the slot holds.

        Args:
            slot: Number of the slot, at least 1.
            layer_edit: The edit, whose rank and feature map the sizes allow.
            strength: Strength of the edit; with 0 the slot holds no edit.
        """
        self.clear(slot)
        if strength == 0:
            return
        self._settings[slot, 0] = strength
        self._settings[slot, 1] = float(layer_edit.normalization == "token")
        if layer_edit.gate is not None:
            self._probe[slot] = layer_edit.gate.probe
            self._threshold[slot] = layer_edit.gate.threshold
        if isinstance(layer_edit, AffineEdit):
            self._load_affine(slot, layer_edit)
        else:
            assert isinstance(layer_edit, FeatureMapEdit)
            self._load_feature_map(slot, layer_edit)

    def _load_affine(self, slot: int, layer_edit: AffineEdit) -> None:
        self._settings[slot, 2] = layer_edit.scale
        self._write_factors(slot, layer_edit.right.T, layer_edit.left.T)
        start = self._start(slot)
        self._mask[slot, start : start + layer_edit.rank] = 1.0
        constant = layer_edit.constant_part()
        if constant is not None:
            self._constant[slot] = constant

    def _load_feature_map(self, slot: int, layer_edit: FeatureMapEdit) -> None:
        projection = layer_edit.projection
        if layer_edit.combine == "reversed":
            projection = projection.reversed()
        factors = torch.cat([projection.positive, projection.negative], dim=1)
        self._write_factors(slot, factors, factors.T)
        start = self._start(slot)
        middle, end = start + projection.rank_positive, start + layer_edit.rank
        self._map[slot] = 1.0 + self._maps.index(projection.feature_map)
        self._positive[slot, start:middle] = 1.0
        self._negative[slot, middle:end] = 1.0
        kept, dropped, origin = _PART_WEIGHTS[layer_edit.combine]
        if projection.mean is None:
            origin = 0.0
        else:
            self._mean[slot] = projection.mean
        self._weights[slot] = torch.tensor([kept, dropped, origin], device=self._weights.device)

    def _write_factors(self, slot: int, inner: Float[Tensor, "d r"], outer: Float[Tensor, "r d"]) -> None:
        start = self._start(slot)
        end = start + inner.shape[1]
        self._inner[:, start:end] = inner
        self._outer[start:end] = outer

    def _start(self, slot: int) -> int:
        """Return the first column of a slot; slot 0 has none."""
        return (slot - 1) * self._rank

    def clear(self, slot: int) -> None:
        """Remove the edit from a slot, so that its tokens are not edited."""
        columns = slice(self._start(slot), self._start(slot) + self._rank)
        self._inner[:, columns] = 0.0
        self._outer[columns] = 0.0
        for buffer in (self._settings, self._mask, self._constant, self._probe):
            buffer[slot] = 0.0
        self._threshold[slot] = -1.0
        for buffer in (self._map, self._positive, self._negative, self._mean, self._weights):
            buffer[slot] = 0.0

    def edited(self, slots: Int[Tensor, " t"]) -> Bool[Tensor, "t 1"]:
        """Return which tokens have a slot that holds an edit.

        Args:
            slots: Slot of each token.
        """
        return self._settings[slots, :1] != 0

    def __call__(self, tokens: Float[Tensor, "t d"], slots: Int[Tensor, " t"]) -> Float[Tensor, "t d"]:
        """Return each token edited by its slot, in the type of the tokens; computed in float32.

        Tokens whose slot holds no edit, or a gate that is closed for them, are returned bit for bit.

        Args:
            tokens: Activations, (t, d).
            slots: Slot of each token, (t,).
        """
        x = tokens.float()
        strength, rescaled, scale = torch.split(self._settings[slots], 1, dim=-1)
        y = torch.addmm(x + scale * x + self._constant[slots], (x @ self._inner).mul_(self._mask[slots]), self._outer)
        for number, name in enumerate(self._maps, start=1):
            y = torch.where(self._map[slots] == number, self._in_feature_space(name, x, slots), y)
        before, after = (torch.linalg.vector_norm(part, dim=-1, keepdim=True) for part in (x, y))
        ratio = torch.where(rescaled > 0, (before / after).nan_to_num(1.0, 1.0), 1.0)  # 1 where y is zero
        edited = torch.lerp(x, y * ratio, strength)
        is_open = (x * self._probe[slots]).sum(-1, keepdim=True) > self._threshold[slots]
        return torch.where((strength != 0) & is_open, edited.to(tokens.dtype), tokens)

    def _in_feature_space(self, name: str, x: Float[Tensor, "t d"], slots: Int[Tensor, " t"]) -> Float[Tensor, "t d"]:
        """Return y of the edits that have a feature map; see ``Projection``."""
        phi = get_feature_map(name)
        mean = self._mean[slots]
        features = phi.forward(x) - mean
        along = features @ self._inner
        kept = phi.inverse(mean + (along * self._positive[slots]) @ self._outer, x)
        dropped = phi.inverse(mean + features - (along * self._negative[slots]) @ self._outer, x)
        of_kept, of_dropped, of_origin = torch.split(self._weights[slots], 1, dim=-1)
        return of_kept * kept + of_dropped * dropped - of_origin * phi.inverse(mean, x)
