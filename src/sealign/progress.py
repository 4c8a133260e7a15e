"""Progress: the function that long-running work calls to show how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Function ``track(items, description, total)`` that yields the items and shows progress as they are consumed."""


def no_progress(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:  # noqa: ARG001
    """Return the items without showing progress."""
    return items
