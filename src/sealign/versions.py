"""Versions of the libraries that a record was made with."""

from __future__ import annotations

import platform
from importlib.metadata import version


def library_versions(*names: str) -> dict[str, str]:
    """Return the versions of Python, of what every edit is made with, and of the packages named."""
    names = ("sealign", "torch", "transformers", *names)
    return {name: version(name) for name in names} | {"python": platform.python_version()}
