"""The bundled texts as rows, and what the tests count in them."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from typing import Any

from sealign.demonstrations import bundled_behaviours

DATA = files("sealign.demonstrations") / "data"
Row = dict[str, Any]


def read(path: str) -> list[Row]:
    text = (DATA / f"{path}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


BEHAVIOURS = {name: read(f"behaviours/{name}") for name in bundled_behaviours()}
DEMONSTRATIONS = [row for rows in BEHAVIOURS.values() for row in rows]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def normal(text: str) -> str:
    """A text without case, punctuation and spacing."""
    return " ".join(words(text))
