"""Prompts to answer with and without an edit, from a file or for a bundled behaviour."""

from __future__ import annotations

from pathlib import Path

from sealign.demonstrations.bundled import BUNDLED_PREFIX, bundled_path
from sealign.errors import DemonstrationError


def load_prompts(source: str | Path) -> list[str]:
    """Load prompts from a text file, or those that are bundled for showing a behaviour.

    The prompts of a bundled behaviour are open, and on topics that occur nowhere in its demonstrations.

    Args:
        source: ``bundled:NAME`` (see ``bundled_behaviours``), or a text file in UTF-8 with one prompt per line.

    Raises:
        DemonstrationError: The name is unknown, or the file is missing, empty or not UTF-8.

    Example:
        >>> load_prompts("bundled:positivity")[0]
        'How is your new haircut?'
    """
    text = str(source)
    path = bundled_path(text, ".txt") if text.startswith(BUNDLED_PREFIX) else Path(source)
    if not path.is_file():
        raise DemonstrationError(f"there is no file '{path}'; give a text file or bundled:NAME")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DemonstrationError(f"'{path}' is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise DemonstrationError(f"'{path}' is empty; write one prompt per line")
    return prompts
