"""Access to the Hugging Face Hub: whether it can be reached, and quick answers where it cannot."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

SECONDS = 3.0
"""Time after which a host that does not answer cannot be reached."""


_SETTINGS = ("huggingface_hub.constants", "datasets.config")
"""Modules that hold the setting ``HF_HUB_OFFLINE``."""


@contextmanager
def hub_access(place: object = None) -> Iterator[None]:
    """Inside a ``with`` block, let the clients of the Hub use their caches alone where the Hub cannot be reached.

    They would try again for half a minute, and print each try.

    Args:
        place: What is loaded inside the block; a path needs no access.

    Example:
        >>> with hub_access():
        ...     pass  # snapshot_download(...)
    """
    from huggingface_hub import constants

    if isinstance(place, Path) or constants.HF_HUB_OFFLINE or is_reachable(constants.ENDPOINT):
        yield
        return
    before = {name: sys.modules[name].HF_HUB_OFFLINE for name in _SETTINGS if name in sys.modules}
    for name in before:
        vars(sys.modules[name])["HF_HUB_OFFLINE"] = True
    try:
        yield
    finally:
        for name in _SETTINGS:
            if name in sys.modules:  # one that was imported inside the block has copied the setting
                vars(sys.modules[name])["HF_HUB_OFFLINE"] = before.get(name, False)


def is_reachable(url: str) -> bool:
    """Return whether the host of a URL accepts a connection; True where a proxy stands between.

    Args:
        url: A URL with ``http`` or ``https``.
    """
    parts = urlsplit(url)
    if any(os.environ.get(name) for name in (f"{parts.scheme}_proxy", f"{parts.scheme}_proxy".upper(), "ALL_PROXY")):
        return True
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname, port), timeout=SECONDS):
            return True
    except OSError:
        return False
