"""Combinations of layers: for each method, site and token choice, the layers and weights of the largest efficiency.

To first order, the changes of several layers add: with g the gains and A the curvature of the divergence (a matrix over
the layers), weights w have the efficiency w.g / sqrt(w^T A w), which is largest for w = A^-1 g.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.evaluation.candidates import Candidate, combine

LAYERS = 4
"""Maximum number of layers of a combination; the weights rest on the development part, so few are enough."""

SHRINKAGE = 0.1
"""Fraction of its diagonal that is added to the curvature, so that noise does not decide between alike layers."""


@dataclass(frozen=True)
class Combination:
    """A combination of candidates.

    Attributes:
        candidate: The candidate that edits all layers.
        members: Indices of the candidates that it combines.
        weights: Their weights, of which the largest is 1.
    """

    candidate: Candidate
    members: Sequence[int]
    weights: Float[Tensor, " m"]


def combinations(
    candidates: Sequence[Candidate],
    gains: Float[Tensor, "n c"],
    draws: Float[Tensor, "k c"],
) -> Iterator[Combination]:
    """Yield the best combination of at most ``LAYERS`` layers for each method, site and token choice.

    Layers are added one by one, each time the one that makes the efficiency largest, as long as all weights are
    positive. Edits that are rescaled are left out, since their changes do not add, and so are methods that fit a layer
    on what the edits of earlier layers have changed.

    Args:
        candidates: Candidates; those of several layers are not combined.
        gains: Derivatives of the preference margin of each development demonstration.
        draws: Derivatives of the log-probability of drawn tokens, divided by the root of their number, such that the
            curvature is draws^T draws.
    """
    families: dict[str, list[int]] = {}
    for index, candidate in enumerate(candidates):
        edit, config = candidate.edit, candidate.config
        adds = edit.is_affine and edit.normalization == "none" and not config.needs_pass_per_layer
        if adds and len(edit.layers) == 1:
            key = repr((candidate.method, config.replace(layers=(0,))))
            families.setdefault(key, []).append(index)
    means, curvature = gains.mean(0), draws.T @ draws
    for family in families.values():
        members: list[int] = []
        weights = torch.empty(0, dtype=torch.float64)
        while len(members) < LAYERS:
            found = [
                (efficiency, index, solved)
                for index in family
                if index not in members
                for efficiency, solved in [_best_weights(means, curvature, [*members, index])]
                if bool((solved > 0).all())
            ]
            if not found:
                break
            _, best, weights = max(found, key=lambda each: each[0])
            members.append(best)
        if len(members) > 1:
            weights = weights / weights.max()
            yield Combination(combine([candidates[index] for index in members], weights.tolist()), members, weights)


def _best_weights(
    means: Float[Tensor, " c"], curvature: Float[Tensor, "c c"], members: Sequence[int]
) -> tuple[float, Float[Tensor, " m"]]:
    """Return the squared efficiency g^T A^-1 g of some candidates together, and the weights A^-1 g."""
    g, a = means[members], curvature[members][:, members]
    weights: Tensor = torch.linalg.lstsq(a + SHRINKAGE * torch.diag(a.diagonal()), g[:, None]).solution[:, 0]
    return float(g @ weights), weights
