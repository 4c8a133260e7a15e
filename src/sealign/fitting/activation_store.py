"""What a fit keeps of activations: their rows or their sums, in memory or in a file, whichever needs the least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import psutil

from sealign.errors import SettingError, unknown_name

Kept = Literal["rows", "sums"]
"""The rows of H, H+ and H-, or the sums H^T H+ and H^T H-."""

Place = Literal["memory", "disk"]
"""Where they are: in memory, or in a file that is mapped into it."""


@dataclass(frozen=True)
class Keep:
    """What is kept of the activations, and where.

    Attributes:
        kept: ``rows``, 12 n d bytes a layer, or ``sums``, 16 d^2 bytes a layer.
        place: ``memory`` or ``disk``.

    Raises:
        SettingError: a value is unknown.
    """

    kept: Kept = "rows"
    place: Place = "memory"

    def __post_init__(self) -> None:
        for kind, value, known in (("kept", self.kept, get_args(Kept)), ("place", self.place, get_args(Place))):
            if value not in known:
                raise SettingError(unknown_name(kind, value, known))


def rows_bytes(count: int, widths: Sequence[int]) -> int:
    """Return the bytes of the rows of n demonstrations: three float32 rows a layer.

    Example:
        >>> rows_bytes(2000, [4096] * 21)
        2064384000
    """
    return sum(12 * count * width for width in widths)


def sums_bytes(widths: Sequence[int]) -> int:
    """Return the bytes of the sums: two (d, d) float64 matrices a layer, whatever n is.

    Example:
        >>> sums_bytes([4096] * 21)
        5637144576
    """
    return sum(16 * width**2 for width in widths)


def choose_keep(count: int, widths: Sequence[int], *, memory: int | None = None) -> Keep:
    """Return what needs the least: rows or sums, in memory where they fit into half of what is free.

    Args:
        count: n.
        widths: d of each layer.
        memory: free bytes; as the system says if None.

    Example:
        >>> choose_keep(2000, [4096] * 21, memory=2**36)
        Keep(kept='rows', place='memory')
        >>> choose_keep(100_000, [4096] * 21, memory=2**33)
        Keep(kept='sums', place='disk')
    """
    free = psutil.virtual_memory().available if memory is None else memory
    rows, sums = rows_bytes(count, widths), sums_bytes(widths)
    return Keep("rows" if rows <= sums else "sums", "memory" if min(rows, sums) <= free / 2 else "disk")
