"""How a fit stores activations: as rows or as sums, in memory or in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from sealign.errors import check_choice
from sealign.fitting.free_memory import free_memory as measure_free_memory

Kept = Literal["rows", "sums"]
"""``rows``: the matrices H, H+ and H- of each layer; ``sums``: the products H^T H+ and H^T H- of each layer."""

Place = Literal["memory", "disk"]
"""``memory``, or ``disk``: a temporary file that is mapped into memory."""


@dataclass(frozen=True)
class Keep:
    """How the activations of all layers are stored until the layers are fitted.

    Attributes:
        kept: ``rows``, 12 n d bytes for each layer, or ``sums``, 16 d^2 bytes for each layer.
        place: ``memory`` or ``disk``.

    Raises:
        SettingError: A value is unknown.
    """

    kept: Kept = "rows"
    place: Place = "memory"

    def __post_init__(self) -> None:
        check_choice("kept", self.kept, get_args(Kept))
        check_choice("place", self.place, get_args(Place))


def rows_bytes(count: int, widths: Sequence[int]) -> int:
    """Return the size of the rows of n demonstrations in bytes: three float32 rows for each layer.

    Args:
        count: Number n of demonstrations.
        widths: Number of features d of each layer.

    Example:
        >>> rows_bytes(2000, [4096] * 21)
        2064384000
    """
    return sum(12 * count * width for width in widths)


def sums_bytes(widths: Sequence[int]) -> int:
    """Return the size of the sums in bytes: two (d, d) float64 matrices for each layer, for any n.

    Args:
        widths: Number of features d of each layer.

    Example:
        >>> sums_bytes([4096] * 21)
        5637144576
    """
    return sum(16 * width**2 for width in widths)


def choose_keep(count: int, widths: Sequence[int], *, needs_rows: bool = False, free_memory: int | None = None) -> Keep:
    """Choose the smaller representation; use a file when it exceeds half of free memory.

    Args:
        count: Number n of demonstrations.
        widths: Number of features d of each layer.
        needs_rows: Whether the method cannot be fitted from sums, so that rows are stored in any case.
        free_memory: Free memory in bytes. Default: what this process may use.

    Example:
        >>> choose_keep(2000, [4096] * 21, free_memory=2**36)
        Keep(kept='rows', place='memory')
        >>> choose_keep(100_000, [4096] * 21, free_memory=2**33)
        Keep(kept='sums', place='disk')
    """
    free = measure_free_memory() if free_memory is None else free_memory
    rows, sums = rows_bytes(count, widths), sums_bytes(widths)
    kept: Kept = "rows" if needs_rows or rows <= sums else "sums"
    size = rows if kept == "rows" else sums
    return Keep(kept, "memory" if size <= free / 2 else "disk")
