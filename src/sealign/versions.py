"""Versions of the installed libraries, for the record of an edit or an evaluation."""

from __future__ import annotations

import platform
from importlib.metadata import version


def library_versions(*names: str) -> dict[str, str]:
    """Return the versions of Python, Sealign, torch, transformers and further packages by name.

    Args:
        *names: Further packages, each of which must be installed.
    """
    names = ("sealign", "torch", "transformers", *names)
    return {name: version(name) for name in names} | {"python": platform.python_version()}
