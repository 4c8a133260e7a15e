"""Where the tokens of each edit are in a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Rows = slice | Tensor
"""Where the tokens of one edit are in a batch."""


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
