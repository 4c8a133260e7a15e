"""Tables of measured values with intervals, or with the reason why a value is missing; as CSV, LaTeX and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MARK = "*"
"""Mark of a value that differs from the reference row with a p-value of at most 0.05."""

MISSING = "-"
"""Text of a value that was not computed."""


@dataclass(frozen=True)
class Cell:
    """One value, or the reason why it is missing.

    Attributes:
        value: The measured value; None if it is missing.
        low, high: Ends of its 95 % interval; None if it has no interval.
        differs: Whether it differs from the reference row with a p-value of at most 0.05; None if that was not tested.
        missing: Reason why the value is missing.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    differs: bool | None = None
    missing: str = ""


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: Heading, with the unit.
        digits: Number of digits after the decimal point.
        scale: Factor of the shown values, such as 100 for percent.
    """

    name: str
    digits: int = 1
    scale: float = 1.0


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: Name of the files.
        title: Title.
        columns: Columns in order.
        rows: Rows in order, by name, with one cell per column.
        notes: Remarks for the reader.
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: Mapping[str, Sequence[Cell]]
    notes: Sequence[str] = field(default=())

    def text(self, column: int, cell: Cell) -> str:
        """Return the text of a cell, such as ``36.9 [35.0, 38.8]*``, or a dash if the value is missing.

        Args:
            column: Index of the column.
            cell: The cell.
        """
        shown = self.columns[column]
        if cell.value is None:
            return MISSING
        value = f"{shown.scale * cell.value:.{shown.digits}f}"
        if cell.low is not None and cell.high is not None:
            low, high = (f"{shown.scale * bound:.{shown.digits}f}" for bound in (cell.low, cell.high))
            value += f" [{low}, {high}]"
        return value + (MARK if cell.differs else "")

    def reasons(self) -> list[str]:
        """Return the reasons why values are missing, each once, with the names of the rows."""
        found: dict[str, list[str]] = {}
        for name, cells in self.rows.items():
            for cell in cells:
                if cell.value is None and name not in found.setdefault(cell.missing, []):
                    found[cell.missing].append(name)
        return [f"missing in {', '.join(names)}: {reason}" for reason, names in found.items()]


def to_csv(table: Table) -> str:
    """Return a table as CSV with one row per cell: the unscaled value, its interval, its mark and the reason.

    Example:
        >>> print(to_csv(Table("t", "T", [Column("MC1 %", scale=100)], {"base": [Cell(0.25, 0.1, 0.4)]})), end="")
        row,column,value,low,high,differs,missing
        base,MC1 %,0.25,0.1,0.4,,
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["row", "column", "value", "low", "high", "differs", "missing"])
    for name, cells in table.rows.items():
        for column, cell in zip(table.columns, cells, strict=True):
            numbers = ["" if number is None else number for number in (cell.value, cell.low, cell.high, cell.differs)]
            writer.writerow([name, column.name, *numbers, cell.missing])
    return buffer.getvalue()


def to_latex(table: Table) -> str:
    r"""Return a table in LaTeX, for the package booktabs; intervals are set in a small size after their values.

    Example:
        >>> print(to_latex(Table("t", "T", [Column("MC1")], {"base": [Cell(1, 0, 2)]})).splitlines()[5])
        base & 1.0 {\scriptsize [0.0, 2.0]} \\
    """
    lines = [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule"]
    lines += [" & ".join(["", *(_escaped(column.name) for column in table.columns)]) + r" \\ \midrule"]
    for name, cells in table.rows.items():
        shown = [_latex_cell(table.text(index, cell)) for index, cell in enumerate(cells)]
        lines.append(" & ".join([_escaped(name), *shown]) + r" \\")
    notes = " ".join(_escaped(note) for note in (*table.notes, *table.reasons()))
    lines += [r"\bottomrule", r"\end{tabular}", rf"\caption{{{_escaped(table.title)}. {notes}}}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def to_markdown(table: Table) -> str:
    """Return a table in Markdown, with its notes below."""
    lines = ["| | " + " | ".join(column.name for column in table.columns) + " |"]
    lines.append("| --- |" + " --- |" * len(table.columns))
    for name, cells in table.rows.items():
        shown = [table.text(index, cell) for index, cell in enumerate(cells)]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    lines += [""] + [f"- {note}" for note in (*table.notes, *table.reasons())]
    return "\n".join(lines) + "\n"


def _latex_cell(text: str) -> str:
    value, bracket, rest = text.partition(" [")
    if not bracket:
        return _escaped(text)
    interval, _, mark = rest.partition("]")
    return rf"{value}{_escaped(mark)} {{\scriptsize [{interval}]}}"


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    character: "\\" + character for character in "&%$#_{}"
}


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
