"""Where a target's results are written: CSV, LaTeX, Markdown, figures and one page of HTML that needs no network."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sealign.figures import Mark, save_figure, save_points
from sealign.files import write_bytes
from sealign.reproduce.table_format import Table, to_csv, to_latex, to_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECORD_NAME = "target.json"
PAGE_NAME = "index.html"


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure with the data it was drawn from.

    Attributes:
        name: of its files.
        title: one line, read where the figure cannot be seen.
        figure: as drawn.
        points: what it draws.
        notes: what a reader must know.
    """

    name: str
    title: str
    figure: Figure
    points: Sequence[Mark]
    notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What made a target.

    Attributes:
        target: its name.
        command: that makes it again.
        model: name.
        settings: of the run, as JSON values.
        versions: of what it was made with.
    """

    target: str
    command: str
    model: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]


def write_target(result: Table | Drawing, provenance: Provenance, folder: Path) -> None:
    """Write a target's files to a folder; its record comes last, so that a folder with one is complete.

    Args:
        result: a table or a figure.
        provenance: for the page and the record.
        folder: is made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(result, Table):
        write_bytes(folder / f"{result.name}.csv", to_csv(result).encode())
        write_bytes(folder / f"{result.name}.tex", to_latex(result).encode())
        write_bytes(folder / f"{result.name}.md", (f"# {result.title}\n\n" + to_markdown(result)).encode())
        image = ""
    else:
        image = _write_figure(result, folder)
    write_bytes(folder / PAGE_NAME, _html(result, provenance, image).encode())
    write_bytes(folder / RECORD_NAME, json.dumps(dataclasses.asdict(provenance), indent=2).encode() + b"\n")


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a finished target, or None where there is none that can be read."""
    try:
        found = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write_figure(drawing: Drawing, folder: Path) -> str:
    """Write PDF, PNG and CSV, and return the PNG as a data URL."""
    save_figure(drawing.figure, folder / drawing.name)
    save_points(drawing.points, folder / drawing.name)
    png = (folder / f"{drawing.name}.png").read_bytes()
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _html(result: Table | Drawing, provenance: Provenance, image: str) -> str:
    import jinja2

    text = (files("sealign") / "reproduce" / "templates" / "target.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(text).render(
        result=result,
        provenance=provenance,
        image=image,
        table=result if isinstance(result, Table) else None,
        notes=[*result.notes, *(result.reasons() if isinstance(result, Table) else [])],
    )
