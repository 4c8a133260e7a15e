"""One edit of one module computed alone, for the tokens that ask for it: fast where no graph is captured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.export.linear import linear_change
from sealign.projection import Projection
from sealign.record import EditSettings

Rows = slice | Tensor
"""Where the tokens of one edit are in a batch."""


def edit_alone(
    projection: Projection, settings: EditSettings
) -> Callable[[Float[Tensor, "t d"]], Float[Tensor, "t d"]]:
    """Return the function that edits tokens as a projection does, with as few operations as it takes.

    A linear edit has its factors side by side and its weights folded in: y = x + a x + (x R^T) L^T + b, rescaled, and
    x' = x + strength (y - x). With a feature map it is the projection itself.

    Args:
        projection: of the layer.
        settings: of the edit; rescaled per token or not.
    """
    if settings.feature_map != "identity":
        return lambda tokens: projection(
            tokens,
            combine=settings.combine,  # type: ignore[arg-type]
            normalization=settings.normalization,  # type: ignore[arg-type]
            strength=settings.strength,
        )
    change = linear_change(projection, dataclasses.replace(settings, strength=1.0))
    inner, outer = change.right.T.float().contiguous(), change.left.T.float().contiguous()
    shift = None if change.shift is None else change.shift.float()

    def edit(tokens: Tensor) -> Tensor:
        x = tokens.float()
        start = x if shift is None else x + shift
        y = torch.addmm(start, x @ inner, outer)
        if change.scale:
            y.add_(x, alpha=change.scale)
        if settings.normalization == "token":
            norms = [torch.linalg.vector_norm(part, dim=-1, keepdim=True) for part in (x, y)]
            y.mul_(norms[0] / norms[1].clamp_min(1e-20))
        return torch.lerp(x, y, settings.strength).to(tokens.dtype)

    return edit


def rows_by_slot(requests: Sequence[tuple[int, int]]) -> list[tuple[int, Rows]]:
    """Return where the tokens of each slot are, but for slot 0: a slice where they stand together.

    Args:
        requests: slot and number of tokens of each request, in the order of the batch.

    Example:
        >>> rows_by_slot([(0, 2), (3, 1), (3, 4)])
        [(3, slice(2, 7, None))]
    """
    spans: dict[int, list[tuple[int, int]]] = {}
    start = 0
    for slot, count in requests:
        if slot and count:
            own = spans.setdefault(slot, [])
            if own and own[-1][1] == start:
                own[-1] = (own[-1][0], start + count)
            else:
                own.append((start, start + count))
        start += count
    return [
        (slot, slice(*own[0]) if len(own) == 1 else torch.cat([torch.arange(*span) for span in own]))
        for slot, own in spans.items()
    ]
