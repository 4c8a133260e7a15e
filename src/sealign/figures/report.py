"""The report of an evaluation: a self-contained HTML file, a table and figures."""

from __future__ import annotations

import base64
import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sealign.evaluation.comparison import EditReport, Row
from sealign.evaluation.results import ANSWERS, BASE, Results
from sealign.evaluation.search import SCAN_NAME
from sealign.evaluation.verdict import MAX_DAMAGE
from sealign.figures.evaluation_figures import (
    LAYER_MAP_NAME,
    categories_figure,
    damage_figure,
    differences_figure,
    gain_damage_figure,
)
from sealign.figures.style import save_figure, svg_text
from sealign.figures.sweep import sweep, sweep_points, sweeps
from sealign.files import write_bytes
from sealign.folders import new_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT_NAME = "report.html"
TABLE_NAME = "table.csv"
FIGURES_NAME = "figures"
SHOWN_ANSWERS = 10
"""Number of prompts whose answers the opening shows."""

CHANGED_ITEMS = 5
"""Number of gains, and of losses, that the report shows for each headline metric."""


@dataclass(frozen=True)
class ChangedItem:
    """An item whose score the edit changed.

    Attributes:
        question: The question.
        base: Answer of the base model.
        edited: Answer of the edited model.
        change: Change of the score; above 0 if it is an improvement.
    """

    question: str
    base: str
    edited: str
    change: float


def write_report(
    results: Results, reports: Sequence[EditReport], folder: str | Path, *, max_damage: float = MAX_DAMAGE
) -> None:
    """Write ``report.html``, ``table.csv`` and the figures of an evaluation to a folder.

    Args:
        results: Results of an evaluation.
        reports: Statistics of its edits, from ``report_edits``.
        folder: Folder to write to; created if it does not exist. An earlier report in it is replaced.
        max_damage: Budget of the verdicts, in nats per token.

    Raises:
        EditFileError: The folder has figures that Sealign did not write.
    """
    path = Path(folder)
    figures = {report.edit: _figures(report, max_damage) for report in reports}
    openings = _openings(results, reports, max_damage)
    with new_folder(path / FIGURES_NAME, overwrite=True) as temporary:
        for edit, named in [*figures.items(), *((opening.name, opening.figures) for opening in openings)]:
            for name, (_, figure) in named.items():
                save_figure(figure, temporary / f"{_slug(edit)}-{name}")
    write_bytes(path / TABLE_NAME, _table(reports).encode())
    write_bytes(path / REPORT_NAME, _html(results, reports, openings, figures, max_damage).encode())


@dataclass(frozen=True)
class _Opening:
    """What the report opens with for one edit, at one strength or at several.

    Attributes:
        name: Name of the edit.
        figures: Mapping from file name to description and figure.
        layer_map: Figure of the search that found the edit as PNG; None if there was none.
    """

    name: str
    figures: dict[str, tuple[str, Figure]]
    layer_map: bytes | None


def _openings(results: Results, reports: Sequence[EditReport], max_damage: float) -> list[_Opening]:
    """Return the openings of all edits; several strengths of one edit have one opening."""
    families: dict[str, list[EditReport]] = {}
    for report in reports:
        families.setdefault(results.arms[report.edit].sweep or report.edit, []).append(report)
    found = []
    for name, family in families.items():
        figures = {}
        if any(report.main is not None for report in family):
            title = "Gain against the increase of the loss on neutral text, with 95 % intervals"
            figures["gain-damage"] = (title, gain_damage_figure(family, max_damage))
            own = [damage for report in family for damage in report.domain_damage.values()]
            if any(math.isfinite(damage.mean_divergence) for damage in own):  # which a server does not give
                title = "Gain against the KL divergence on the base model's own answers, with 95 % intervals"
                figures["gain-own-answers"] = (title, gain_damage_figure(family, max_damage, own_answers=True))
        if name in sweeps(results) and (points := sweep_points(results, family, name)):
            figures["sweep"] = ("Differences from the base model against the strength", sweep(points))
        found.append(_Opening(name, figures, _layer_map(results.arms[family[0].edit].source)))
    return found


def _layer_map(source: str | None) -> bytes | None:
    """Return the layer map beside an edit that ``sealign tune`` found, or None if there is none."""
    folder = None if source is None else Path(source).parent
    if folder is None or not (folder / SCAN_NAME).is_file():
        return None
    path = folder / FIGURES_NAME / f"{LAYER_MAP_NAME}.png"
    return path.read_bytes() if path.is_file() else None


def changed_items(results: Results, report: EditReport, row: Row, *, count: int = CHANGED_ITEMS) -> list[ChangedItem]:
    """Return the items whose score changed most, first the largest gains, then the largest losses.

    Args:
        results: Results of an evaluation.
        report: Statistics of the edit.
        row: Row of the metric. A ratio has no scores of single items, so that there are no changed items.
        count: Maximum number of gains, and of losses.
    """
    task = results.tasks[row.task]
    metric = task.metrics[row.metric]
    base, edited = metric.item_scores(BASE), metric.item_scores(report.edit)
    if base.denominators is not None:
        return []
    sign = -1.0 if metric.aim == "lower" else 1.0
    change = sign * (edited.numerators - base.numerators)
    order = np.argsort(-change, kind="stable")
    gains = [int(i) for i in order[:count] if change[i] > 0]
    losses = [int(i) for i in order[::-1][:count] if change[i] < 0]
    items = [(i, metric.items[i]) for i in (*gains, *losses)]
    answers = task.answers
    return [
        ChangedItem(task.questions[item], answers[BASE][item], answers[report.edit][item], float(change[i]))
        for i, item in items
    ]


def _figures(report: EditReport, max_damage: float) -> dict[str, tuple[str, Figure]]:
    """Return the figures of an edit by file name, each with its description."""
    found = {
        "differences": ("Differences from the base model with 95 % intervals", differences_figure(report)),
        "damage": ("Increase of the loss on neutral text", damage_figure(report, max_damage)),
    }
    subgroups: dict[tuple[str, str], list[Row]] = {}
    headlines = {(row.task, row.metric) for row in report.headlines}
    for row in report.rows:
        metric, _, subgroup = row.metric.partition("/")
        if subgroup and (row.task, metric) in headlines and np.isfinite([row.base, row.edited]).all():
            subgroups.setdefault((row.task, metric), []).append(row)
    for (task, metric), rows in subgroups.items():
        found[_slug(f"{task}-{metric}")] = (f"{task} {metric} by subgroup", categories_figure(rows))
    return found


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-")


def _table(reports: Sequence[EditReport]) -> str:
    """Return all rows of all edits as CSV."""
    rows = [_table_row(report.edit, row) for report in reports for row in report.rows]
    buffer = io.StringIO()
    empty = Row(task="", metric="", headline=False, aim=None, base=0.0, edited=0.0, difference=None)
    writer = csv.DictWriter(buffer, _table_row("", empty), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _table_row(edit: str, row: Row) -> dict[str, Any]:
    d = row.difference
    return {
        "edit": edit,
        "task": row.task,
        "metric": row.metric,
        "headline": row.headline,
        "items": d and d.items,
        "groups": d and d.groups,
        "base": _finite(row.base),
        "edited": _finite(row.edited),
        "difference": d and d.difference,
        "low": d and d.low,
        "high": d and d.high,
        "p_value": d and d.p_value,
        "test": d and d.test,
        "adjusted_p": row.adjusted_p,
        "smallest_detectable": d and d.smallest_detectable,
        "random_difference": row.random and row.random.difference,
        "over_random": row.over_random and row.over_random.difference,
        "reversed_difference": row.reversed and row.reversed.difference,
    }


def _html(
    results: Results,
    reports: Sequence[EditReport],
    openings: Sequence[_Opening],
    figures: dict[str, dict[str, tuple[str, Figure]]],
    max_damage: float,
) -> str:
    import jinja2

    text = (files("sealign") / "figures" / "templates" / "report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"number": _number, "signed": _signed, "slug": _slug, "svg": _svg_url, "png": _png_url}
    images = {
        edit: {name: (title, _svg_url(figure)) for name, (title, figure) in named.items()}
        for edit, named in figures.items()
    }
    changes = {
        report.edit: [(row, found) for row in report.headlines if (found := changed_items(results, report, row))]
        for report in reports
    }
    return environment.from_string(text).render(
        results=results,
        reports=reports,
        openings=openings,
        images=images,
        changes=changes,
        max_damage=max_damage,
        answers=results.tasks.get(ANSWERS),
        shown_answers=SHOWN_ANSWERS,
    )


def _png_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def _svg_url(figure: Figure) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg_text(figure).encode()).decode()


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _number(value: Any, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.3f}" if np.isfinite(value) else "not finite"


def _signed(value: Any) -> str:
    return _number(value, "+")
