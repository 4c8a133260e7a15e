"""The edit of one layer in the feature space of an elementwise map."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from sealign.edits.layer_edit import EditFunction, LayerEdit, Strength, move_factor
from sealign.edits.operator import autocast_enabled
from sealign.edits.random_rotation import random_rotation
from sealign.errors import check_choice
from sealign.spectral.projection import COMBINES, Combine, Projection


@dataclass(frozen=True, eq=False)
class FeatureMapEdit(LayerEdit):
    """An edit in the feature space of an invertible elementwise map (Phi-SEA).

    y = Phi^-1(P+ Phi(x)) + Phi^-1(P- Phi(x)), or another combination; see ``Projection``.

    Attributes:
        projection: U+ and U- in feature space, with the name of Phi.
        combine: Which projected parts make y.
    """

    projection: Projection
    combine: Combine = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("combination", self.combine, COMBINES)

    @property
    def width(self) -> int:
        """Number of features d."""
        return self.projection.width

    @property
    def rank(self) -> int:
        """Number of directions kept and dropped, k+ + k-."""
        return sum(self.groups)

    @property
    def groups(self) -> tuple[int, int]:
        """Numbers of directions kept and dropped, (k+, k-)."""
        return self.projection.rank_positive, self.projection.rank_negative

    @property
    def feature_map(self) -> str:
        """Name of Phi."""
        return self.projection.feature_map

    def own_tensors(self) -> dict[str, Tensor]:
        """Return ``positive`` and ``negative``, and ``mean`` if the edit is centred."""
        found = self.projection
        named = {"positive": found.positive, "negative": found.negative, "mean": found.mean}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def randomized(self, seed: int) -> FeatureMapEdit:
        """Return the edit with U+ and U- rotated at random, independently of each other; the mean stays.

        Args:
            seed: Seed of the rotations.
        """
        found = self.projection
        rotated = dataclasses.replace(
            found,
            positive=random_rotation(found.positive, 2 * seed)(found.positive),
            negative=random_rotation(found.negative, 2 * seed + 1)(found.negative),
        )
        return dataclasses.replace(self, projection=rotated)

    def reversed(self) -> FeatureMapEdit:
        """Return the edit with the roles of positives and negatives exchanged."""
        return dataclasses.replace(self, projection=self.projection.reversed())

    def _make(self, device: torch.device, dtype: torch.dtype) -> EditFunction:
        moved = {name: move_factor(tensor, device, dtype) for name, tensor in self.own_tensors().items()}
        projection = Projection(moved["positive"], moved["negative"], moved.get("mean"), self.feature_map)

        def edit(tokens: Tensor, strength: Strength) -> Tensor:
            if autocast_enabled(tokens.device.type):
                with torch.autocast(tokens.device.type, enabled=False):
                    return edit(tokens, strength)
            return projection(tokens, combine=self.combine, normalization=self.normalization, strength=strength)

        return edit
