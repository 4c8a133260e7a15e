"""Docstrings as griffe reads them: what it does not know of ours."""

from __future__ import annotations

import re

SHARED = re.compile(r"^    (\w+(?:, \w+)+)(:.*(?:\n {8}.*)*)", re.MULTILINE)
"""Arguments that share a description, and the description."""


def as_griffe_reads(docstring: str) -> str:
    """Return a docstring whose ``Example:`` is ``Examples:``, with a line for each argument.

    Args:
        docstring: Docstring without the indentation of its first line.
    """
    text = re.sub(r"^Example:$", "Examples:", docstring, flags=re.MULTILINE)
    return SHARED.sub(lambda found: "\n".join(f"    {name}{found[2]}" for name in found[1].split(", ")), text)


def with_default(docstring: str, name: str, default: str) -> str:
    """Return a docstring that says the default of a setting, unless its description does.

    Args:
        docstring: Docstring of a class.
        name: Name of the setting.
        default: The default, as Python.
    """
    described = re.compile(rf"^    {name}:.*(?:\n {{8}}.*)*", re.MULTILINE)

    def complete(found: re.Match[str]) -> str:
        return found[0] if "Default:" in found[0] else f"{found[0]} Default: ``{default}``."

    return described.sub(complete, docstring)
