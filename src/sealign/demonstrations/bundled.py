"""The bundled behaviours: demonstrations by topic, and prompts on topics of their own; and bundled ordinary text."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from sealign.errors import DemonstrationError, unknown_name

BUNDLED_PREFIX = "bundled:"
"""Prefix of the name of a bundled behaviour in a source, as in ``bundled:positivity``."""

_DATA = Path(str(files("sealign.demonstrations") / "data"))

_FOLDER = _DATA / "behaviours"


def bundled_behaviours() -> list[str]:
    """Return the names of the bundled behaviours, sorted.

    Example:
        >>> "positivity" in bundled_behaviours()
        True
    """
    return sorted(path.stem for path in _FOLDER.glob("*.jsonl"))


def bundled_path(source: str, suffix: str) -> Path:
    """Return the file of a bundled behaviour.

    Args:
        source: ``bundled:`` and the name of the behaviour.
        suffix: ``.jsonl`` for the demonstrations, ``.txt`` for the prompts.

    Raises:
        DemonstrationError: There is no bundled behaviour of that name.
    """
    name = source.removeprefix(BUNDLED_PREFIX)
    if name not in bundled_behaviours():
        raise DemonstrationError(unknown_name("bundled demonstrations", name, bundled_behaviours()))
    return _FOLDER / f"{name}{suffix}"


def ordinary_texts() -> list[str]:
    """Return the bundled paragraphs of ordinary text, on which edits are fitted to act little.

    They have no sentence in common with the neutral text on which damage is measured.

    Example:
        >>> len(ordinary_texts()) > 10
        True
    """
    return _paragraphs("ordinary.txt")


def neutral_texts() -> list[str]:
    """Return the bundled paragraphs of neutral text, on which damage is measured.

    Example:
        >>> len(neutral_texts()) > 10
        True
    """
    return _paragraphs("neutral.txt")


def _paragraphs(name: str) -> list[str]:
    text = (_DATA / name).read_text(encoding="utf-8")
    return [paragraph.strip() for paragraph in text.split("\n\n") if paragraph.strip()]
