"""Demonstrations that are pasted as text into the page, read as those of a file."""

from __future__ import annotations

import tempfile
from pathlib import Path

from sealign.demonstrations.demonstration import Demonstration
from sealign.demonstrations.sources import load_demonstrations
from sealign.errors import DemonstrationError

MAX_ROWS = 2000
"""Largest number of demonstrations."""


def read_pasted(text: str) -> list[Demonstration]:
    """Return the demonstrations in a text: JSON lines, a JSON array, or a table with a header.

    Args:
        text: The contents of a ``.jsonl``, ``.json`` or ``.csv`` file; see ``load_demonstrations``.

    Raises:
        DemonstrationError: The text is empty, a row is malformed, or there are too many.

    Example:
        >>> row = '{"prompt": "Is ice cold?", "positive": "Yes.", "negative": "No."}'
        >>> len(read_pasted(row + chr(10) + row.replace("ice", "snow")))
        2
    """
    suffix = {"{": ".jsonl", "[": ".json"}.get(text.lstrip()[:1], ".csv")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"pasted{suffix}"
        path.write_text(text, encoding="utf-8")
        try:
            found = load_demonstrations(path)
        except DemonstrationError as error:
            message = str(error).replace(f"'{path}'", "the text").replace(str(path), "the text")
            raise DemonstrationError(message) from error
    if len(found) > MAX_ROWS:
        raise DemonstrationError(f"there are {len(found)} demonstrations, but a page fits {MAX_ROWS}; use sealign fit")
    return found
