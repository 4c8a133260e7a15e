"""The cache of an amateur, kept on the cache of its expert through everything that generation does to that one."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

_TWIN = "_sealign_amateur"
"""Attribute of the expert's cache that holds the amateur's cache, so that it is copied together with it."""

_SHARED = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices", "crop")
"""Methods of a cache that change its rows, or remove its last tokens."""


def paired_cache(expert: Any) -> Any:
    """Return the amateur's cache that is kept on the expert's, or None.

    Args:
        expert: Cache of the expert, or None.
    """
    return getattr(expert, _TWIN, None)


def pair_caches(expert: Any, amateur: Any) -> None:
    """Keep the amateur's cache on the expert's, with the same rows and tokens, which beam search and drafts change.

    Args:
        expert: Cache of the expert.
        amateur: Cache of the amateur.
    """
    setattr(expert, _TWIN, amateur)
    for name in _SHARED:
        # A bound method, which a copy of the cache has for itself.
        setattr(expert, name, MethodType(functools.partial(_for_both, name), expert))


def _for_both(name: str, expert: Any, *args: Any) -> None:
    """Call a method of the expert's class of caches on both caches."""
    amateur = getattr(expert, _TWIN)
    before = amateur.get_seq_length() - expert.get_seq_length()  # tokens of the amateur's prefix
    getattr(type(expert), name)(expert, *args)
    if name == "crop" and args[0] >= 0:
        args = (args[0] + before,)
    getattr(amateur, name)(*args)
