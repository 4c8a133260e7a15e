"""Demonstrations that are typed or pasted into the page, read as those of a file."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from sealign.demonstrations.demonstration import Demonstration
from sealign.demonstrations.sources import load_demonstrations
from sealign.errors import DemonstrationError

MAX_ROWS = 2000
"""Largest number of demonstrations."""


class RowError(DemonstrationError):
    """A row of the table is malformed.

    Attributes:
        row: Number of the row, from 1.
    """

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row: int = row


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
    return _read(text, suffix, "the text")


def read_table(rows: Sequence[Mapping[str, str]]) -> list[Demonstration]:
    """Return the demonstrations in the rows of a table.

    Args:
        rows: Rows with the keys ``prompt``, ``positive`` and ``negative``.

    Raises:
        RowError: A row is malformed.
        DemonstrationError: There are too few or too many rows.

    Example:
        >>> rows = [{"prompt": f"Is {what} cold?", "positive": "Yes.", "negative": "No."} for what in ("ice", "snow")]
        >>> read_table(rows)[1].prompt
        'Is snow cold?'
    """
    if not rows:
        raise DemonstrationError("the table is empty; write at least 2 demonstrations")
    try:
        # A row is a line, so the line of an error is the row.
        return _read("\n".join(json.dumps(dict(row)) for row in rows), ".jsonl", "the table")
    except DemonstrationError as error:
        place = re.match(r"the table, line (\d+): ", str(error))
        if place is None:
            raise
        raise RowError(f"row {place[1]}: {str(error)[place.end() :]}", int(place[1])) from error


def _read(text: str, suffix: str, name: str) -> list[Demonstration]:
    """Return the demonstrations in a text; errors name it by a name instead of a path."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"pasted{suffix}"
        path.write_text(text, encoding="utf-8")
        try:
            found = load_demonstrations(path)
        except DemonstrationError as error:
            raise DemonstrationError(str(error).replace(f"'{path}'", name).replace(str(path), name)) from error
    if len(found) > MAX_ROWS:
        raise DemonstrationError(f"there are {len(found)} demonstrations, but a page fits {MAX_ROWS}; use sealign fit")
    return found
