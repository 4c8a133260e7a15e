"""Files of a target: CSV, LaTeX, Markdown, figures, and a self-contained HTML page."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sealign.figures import Point, save_figure, save_points
from sealign.files import write_bytes
from sealign.folders import new_folder
from sealign.reproduce.table_format import Table, to_csv, to_latex, to_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECORD_NAME = "target.json"
PAGE_NAME = "index.html"


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure with its data.

    Attributes:
        name: Name of the files.
        title: Title, which is also the text alternative of the figure.
        figure: The figure.
        points: Points that the figure draws.
        notes: Remarks for the reader.
    """

    name: str
    title: str
    figure: Figure
    points: Sequence[Point]
    notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Provenance:
    """How a target was computed.

    Attributes:
        target: Name of the target.
        command: Command line that computes it again.
        model: Name or path of the model.
        settings: Settings of the run, as JSON values.
        versions: Versions of the libraries.
    """

    target: str
    command: str
    model: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]


def write_target(result: Table | Drawing, provenance: Provenance, folder: Path) -> None:
    """Write the files of a target to a folder, which is complete at every moment; an earlier target is replaced.

    Args:
        result: A table or a figure.
        provenance: How it was computed, for the page and the record.
        folder: Folder to write to; created if it does not exist.

    Raises:
        EditFileError: The folder has files that are not a target's.
    """
    with new_folder(folder, overwrite=True) as temporary:
        _write_files(result, provenance, temporary)


def _write_files(result: Table | Drawing, provenance: Provenance, folder: Path) -> None:
    if isinstance(result, Table):
        write_bytes(folder / f"{result.name}.csv", to_csv(result).encode())
        write_bytes(folder / f"{result.name}.tex", to_latex(result).encode())
        write_bytes(folder / f"{result.name}.md", (f"# {result.title}\n\n" + to_markdown(result)).encode())
        image = ""
    else:
        image = _write_figure(result, folder)
    write_bytes(folder / PAGE_NAME, _html(result, provenance, image).encode())
    write_bytes(folder / RECORD_NAME, json.dumps(dataclasses.asdict(provenance), indent=2).encode() + b"\n")


def read_target(folder: Path) -> dict[str, Any] | None:
    """Return the record of a finished target, or None if there is no readable one."""
    try:
        found = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write_figure(drawing: Drawing, folder: Path) -> str:
    """Write a figure as PDF, PNG and CSV, and return the PNG as a data URL."""
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
