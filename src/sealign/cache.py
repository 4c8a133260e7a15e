"""The cache: the folder for converted models and unfinished work, and what is in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sealign.errors import check_choice
from sealign.files import hold_lock

PATTERNS = {
    "models": "models/*",
    "fits": "fits/*",
    "adapters": "adapters/*",
    "offload": "offload-*",
    "history": "chat_history",
}
"""Kinds of what is kept, and the pattern of their paths: GGUF files converted to safetensors, finished batches of
interrupted fits, LoRAs that servers have loaded, weights of models larger than memory, and what was typed in chats."""

SAFE_KINDS = ("models", "fits")
"""Kinds of which it is known whether a process uses them: it holds a lock."""


@dataclass(frozen=True)
class CacheEntry:
    """A folder or file of the cache.

    Attributes:
        kind: One of ``PATTERNS``.
        path: Its path.
        size: Number of bytes.
        changed: Time of the last change, in seconds since 1970.
    """

    kind: str
    path: Path
    size: int
    changed: float


def cache_dir() -> Path:
    """Return the folder for converted models and unfinished work: ``SEALIGN_CACHE``, or the user's cache folder."""
    from platformdirs import user_cache_path

    configured = os.environ.get("SEALIGN_CACHE")
    return Path(configured) if configured else user_cache_path("sealign", appauthor=False)


def cache_entries() -> list[CacheEntry]:
    """Return what is in the cache, by kind, the largest first; files that belong to something else are left out."""
    found = [
        _entry(kind, path)
        for kind, pattern in PATTERNS.items()
        for path in cache_dir().glob(pattern)
        if path.suffix != ".lock"
    ]
    return sorted(found, key=lambda entry: (list(PATTERNS).index(entry.kind), -entry.size, entry.path))


def clear_cache(kinds: Iterable[str] = SAFE_KINDS) -> tuple[list[CacheEntry], list[CacheEntry]]:
    """Remove what is in the cache, and return what was removed and what was left, since a process uses it.

    Args:
        kinds: Kinds to remove. Servers may still read their ``adapters``, and models larger than memory their
            ``offload``; end them first.

    Raises:
        SettingError: A kind is unknown.
    """
    from filelock import Timeout

    chosen = list(kinds)
    for kind in chosen:
        check_choice("kind", kind, PATTERNS)
    removed, used = [], []
    for entry in cache_entries():
        if entry.kind in chosen:
            try:
                with hold_lock(entry.path.with_name(f"{entry.path.name}.lock"), timeout=0):
                    shutil.rmtree(entry.path) if entry.path.is_dir() else entry.path.unlink()
            except Timeout:
                used.append(entry)
            else:
                removed.append(entry)
    return removed, used


def _entry(kind: str, path: Path) -> CacheEntry:
    files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
    stats = [each.stat() for each in (path, *files)]
    return CacheEntry(kind, path, sum(own.st_size for own in stats[1:]), max(own.st_mtime for own in stats))
