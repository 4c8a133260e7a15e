from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest

import sealign
from sealign.errors import DemonstrationError
from sealign.playground import pasted_rows
from sealign.playground.pasted_rows import read_pasted


def test_texts_are_read_as_files_are(demonstrations: list[sealign.Demonstration]) -> None:
    rows = [{"prompt": item.prompt, "positive": item.positive, "negative": item.negative} for item in demonstrations]
    lines = "\n".join(map(json.dumps, rows))
    for text in (lines, f"\n  {lines}\n\n", json.dumps(rows), table(rows, ","), table(rows, ";")):
        assert read_pasted(text) == demonstrations


def table(rows: list[dict[str, str]], separator: str) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the text is empty; write at least 2 demonstrations"),
        ('{"prompt": "a"', "the text, line 1: not JSON"),
        ('{"prompt": "a", "positive": "b"}\n{"prompt": "a", "positive": "b"}', "the text, line 1: "),
        ("prompt,positive\na,b\n", "the text, "),
        ('{"prompt": "a", "positive": "b", "negative": "c"}', "the text has 1 demonstrations, but 2 are needed"),
    ],
)
def test_what_is_malformed_is_named_without_a_path(text: str, words: str, monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(DemonstrationError) as error:
        read_pasted(text)
    assert words in str(error.value)
    assert str(tmp_path) not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_too_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pasted_rows, "MAX_ROWS", 2)
    lines = [json.dumps({"prompt": f"{number}?", "positive": "a", "negative": "b"}) for number in range(3)]
    assert len(read_pasted("\n".join(lines[:2]))) == 2
    with pytest.raises(DemonstrationError, match="there are 3 demonstrations, but a page fits 2; use sealign fit"):
        read_pasted("\n".join(lines))
