from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest

import sealign
from sealign.errors import DemonstrationError
from sealign.playground import pasted_rows
from sealign.playground.pasted_rows import RowError, read_pasted, read_table


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


def test_a_table_is_read_as_a_file_is(demonstrations: list[sealign.Demonstration]) -> None:
    rows = [{"prompt": item.prompt, "positive": item.positive, "negative": item.negative} for item in demonstrations]
    rows[2]["positive"] += "\nAnd \N{SNOWMAN} \u2028 more."
    found = read_table(rows)
    assert [item.positive for item in found] == [row["positive"] for row in rows]
    assert found[3:] == demonstrations[3:]


def test_an_error_names_the_row_of_the_table() -> None:
    rows = [{"prompt": f"{number}?", "positive": "a", "negative": "b"} for number in range(5)]
    for number, (column, value) in {2: ("prompt", " "), 5: ("negative", ""), 3: ("positive", "\ud800")}.items():
        wrong = [dict(row) for row in rows]
        wrong[number - 1][column] = value
        with pytest.raises(RowError, match=f"^row {number}: '{column}' is ") as error:
            read_table(wrong)
        assert error.value.row == number
    with pytest.raises(DemonstrationError, match="the table is empty; write at least 2 demonstrations"):
        read_table([])
    with pytest.raises(DemonstrationError, match="the table has 1 demonstrations, but 2 are needed"):
        read_table(rows[:1])
