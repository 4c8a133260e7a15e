"""Tables as CSV, LaTeX and Markdown."""

from __future__ import annotations

import csv
import io

from hypothesis import given
from hypothesis import strategies as st

from sealign.reproduce.table_format import MISSING, Cell, Column, Table, to_csv, to_latex, to_markdown

COLUMNS = [Column("MC1 %", scale=100), Column("time", digits=2)]
TABLE = Table(
    "t",
    "A_title",
    COLUMNS,
    {
        "base": [Cell(0.25, 0.125, 0.5), Cell(missing="it was not timed")],
        "Info*Truth & co": [Cell(0.5, 0.25, 0.75, differs=True), Cell(2.0)],
        "none": [Cell(missing="no judge"), Cell(missing="it was not timed")],
    },
    ["100 % is all"],
)


def test_text_of_cells() -> None:
    assert TABLE.text(0, TABLE.rows["base"][0]) == "25.0 [12.5, 50.0]"
    assert TABLE.text(0, TABLE.rows["Info*Truth & co"][0]) == "50.0 [25.0, 75.0]*"
    assert TABLE.text(1, TABLE.rows["Info*Truth & co"][1]) == "2.00"
    assert TABLE.text(1, TABLE.rows["base"][1]) == MISSING
    assert TABLE.reasons() == ["missing in base, none: it was not timed", "missing in none: no judge"]


def test_markdown_has_every_cell_and_reason() -> None:
    text = to_markdown(TABLE)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 5
    assert all(row.count("|") == 4 for row in rows)
    assert "- 100 % is all" in text
    assert "no judge" in text


def test_latex_is_escaped_and_has_equal_rows() -> None:
    text = to_latex(TABLE)
    assert r"Info*Truth \& co & 50.0* {\scriptsize [25.0, 75.0]} & 2.00 \\" in text
    assert r"\caption{A\_title. 100 \% is all" in text
    body = [line for line in text.splitlines() if line.endswith(r"\\") or line.endswith(r"\midrule")]
    assert all(line.replace(r"\&", "").count("&") == 2 for line in body)
    assert text.count("{") == text.count("}")


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=6))
def test_csv_keeps_the_numbers(values: list[float | None]) -> None:
    rows = {
        f"row {index}": [Cell(value, missing="" if value is not None else "a reason, with a comma")]
        for index, value in enumerate(values)
    }
    found = list(csv.DictReader(io.StringIO(to_csv(Table("t", "T", [Column("c")], rows)))))
    assert [None if row["value"] == "" else float(row["value"]) for row in found] == values
    assert all((row["missing"] != "") == (row["value"] == "") for row in found)
