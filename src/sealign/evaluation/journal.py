"""The journal of an evaluation: scores saved batch by batch, so that an interruption costs at most one batch."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """A file of results by key, one per line as JSON; each batch is appended and synchronised to disk.

    A line that was cut off by a crash is ignored when the file is opened again.

    Args:
        path: The file; it and its folder are created with the first result. None keeps results in memory only.

    Example:
        >>> journal = Journal(None)
        >>> journal.put({journal.key("prompt", [1, 2]): 0.5})
        >>> journal.get(journal.key("prompt", [1, 2]))
        0.5
    """

    def __init__(self, path: str | Path | None) -> None:
        self._path = None if path is None else Path(path)
        self._results: dict[str, Any] = {}
        if self._path is not None and self._path.is_file():
            for line in self._path.read_text(encoding="utf-8").split("\n"):
                try:
                    key, value = json.loads(line)
                except (json.JSONDecodeError, ValueError, TypeError):
                    continue
                self._results[key] = value

    @staticmethod
    def key(*parts: Any) -> str:
        """Return the key of a result from everything that it depends on, as JSON values."""
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def __contains__(self, key: str) -> bool:
        return key in self._results

    def __len__(self) -> int:
        return len(self._results)

    def get(self, key: str) -> Any:
        """Return the result of a key; a number that is not finite, as ``nan``, ``inf`` or ``-inf``, may be its text.

        Raises:
            KeyError: The journal has no result of this key.
        """
        return self._results[key]

    def put(self, results: Mapping[str, Any]) -> None:
        """Save results by key; they are on disk when this returns."""
        results = {key: _as_json(value) for key, value in results.items()}
        self._results |= results
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # A last line that an earlier run left unfinished must not merge with the first line of this one.
        torn = self._path.is_file() and self._path.stat().st_size > 0 and not self._ends_with_newline()
        with self._path.open("a", encoding="utf-8") as file:
            file.write(
                ("\n" if torn else "") + "".join(f"{json.dumps(item, allow_nan=False)}\n" for item in results.items())
            )
            file.flush()
            os.fsync(file.fileno())

    def _ends_with_newline(self) -> bool:
        assert self._path is not None
        with self._path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


def _as_json(value: Any) -> Any:
    """Return a result with numbers that JSON does not have, NaN and infinity, as texts that ``float`` reads."""
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
