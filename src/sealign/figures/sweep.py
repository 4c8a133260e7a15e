"""Gain, damage and measures of answers against the strength of an edit."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sealign.errors import SettingError
from sealign.evaluation.comparison import EditReport, Row
from sealign.evaluation.damage import Damage
from sealign.evaluation.results import ANSWERS, Results
from sealign.figures.points import Point
from sealign.figures.style import BLUE, COLUMN_WIDTH, figure_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EDITED, RANDOM, REVERSED = "edited", "random directions", "reversed"

NEUTRAL_PANEL, OWN_PANEL = "loss on neutral text", "KL from base on own answers"
"""Titles of the panels of the damage."""

TITLE_WIDTH = 20
"""Largest number of characters in a line of the title of a panel."""

_STYLES: dict[str, dict[str, Any]] = {
    EDITED: {"color": BLUE, "marker": "o", "ms": 4, "lw": 1.2},
    RANDOM: {"color": "0.45", "marker": "s", "mfc": "white", "ms": 3.5, "lw": 1, "ls": "--"},
    REVERSED: {"color": "black", "marker": "X", "ms": 3.5, "lw": 0.8, "ls": ":"},
}


def sweeps(results: Results) -> list[str]:
    """Return the names of the edits that were evaluated at several strengths.

    Args:
        results: Results of an evaluation.
    """
    return list(dict.fromkeys(arm.sweep for arm in results.arms.values() if arm.sweep is not None))


def sweep_points(results: Results, reports: Sequence[EditReport], sweep: str) -> list[Point]:
    """Return differences from the base model against the strength: headline metrics, damage, then measures of answers.

    At strength 0 every difference is 0. Bands are the 95 % intervals of the edit. Differences that are not finite are
    left out.

    Args:
        results: Results of an evaluation at several strengths.
        reports: Statistics of its edits, from ``report_edits``.
        sweep: Name of the edit.

    Raises:
        SettingError: The edit was not evaluated at several strengths.
    """
    own = [report for report in reports if results.arms[report.edit].sweep == sweep]
    if not own:
        known = ", ".join(sweeps(results)) or "none"
        raise SettingError(
            f"'{sweep}' was not evaluated at several strengths (found: {known}); run sealign evaluate with several, as "
            "in --strength 0.5,1,2"
        )
    strengths = {report.edit: float(results.arms[report.edit].strength or 0.0) for report in own}
    own = sorted(own, key=lambda report: strengths[report.edit])
    points: list[Point] = []
    for panel, series in _series(own):
        found = [
            Point(panel, name, strengths[edit], value, low, high)
            for edit, name, value, low, high in series
            if math.isfinite(value)
        ]
        for name in dict.fromkeys(point.series for point in found):
            curve = [*(p for p in found if p.series == name), Point(panel, name, 0.0, 0.0, *_band(name))]
            points += sorted(curve, key=lambda point: point.x)
    return points


def _band(series: str) -> tuple[float | None, float | None]:
    return (0.0, 0.0) if series == EDITED else (None, None)


_Measured = tuple[str, str, float, float | None, float | None]
"""Name of the edit, series, value, and ends of the interval."""


def _series(reports: Sequence[EditReport]) -> Iterator[tuple[str, list[_Measured]]]:
    """Yield each panel with what was measured at all strengths."""
    headlines = [row.name for row in reports[0].headlines]
    measures = [row.name for row in reports[0].shown if row.task == ANSWERS and not row.headline]
    for name in headlines:
        yield name, [each for report in reports for each in _of_row(report, name)]
    yield NEUTRAL_PANEL, [each for report in reports for each in _of_damage(report, report.damage, own=False)]
    if any(report.domain_damage for report in reports):
        yield OWN_PANEL, [each for report in reports for each in _of_damage(report, report.domain_damage, own=True)]
    for name in measures:
        yield name, [each for report in reports for each in _of_row(report, name)]


def _of_row(report: EditReport, name: str) -> Iterator[_Measured]:
    row: Row = next(row for row in report.rows if row.name == name)
    for series, difference in ((EDITED, row.difference), (RANDOM, row.random), (REVERSED, row.reversed)):
        if difference is not None:
            ends = (difference.low, difference.high) if series == EDITED else (None, None)
            yield report.edit, series, difference.difference, *ends


def _of_damage(report: EditReport, measured: dict[str, Damage], *, own: bool) -> Iterator[_Measured]:
    def value(damage: Damage) -> float:
        return damage.mean_divergence if own else damage.loss_increase

    for name, damage in measured.items():
        if name == report.edit:
            yield report.edit, EDITED, value(damage), *(damage.divergence_interval if own else damage.loss_interval)
        elif name == f"{report.edit} reversed":
            yield report.edit, REVERSED, value(damage), None, None
    random = [value(damage) for name, damage in measured.items() if name.startswith(f"{report.edit} random ")]
    if random:
        yield report.edit, RANDOM, float(np.mean(random)), None, None


def sweep(points: Sequence[Point]) -> Figure:
    """Return the figure of ``sweep_points``, with one panel for each metric.

    Args:
        points: Points to draw; must not be empty.

    Raises:
        SettingError: There are no points.
    """
    if not points:
        raise SettingError("there is nothing to draw, since no difference is finite; evaluate smaller strengths")
    panels = list(dict.fromkeys(point.panel for point in points))
    with figure_style():
        from matplotlib.figure import Figure

        columns = min(2, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure = Figure(figsize=(COLUMN_WIDTH, 0.5 + 1.7 * rows))
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, panel in zip(grid, panels, strict=False):
            axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
            for name, style in reversed(_STYLES.items()):  # the edit is drawn above its controls
                own = [point for point in points if (point.panel, point.series) == (panel, name)]
                if own:
                    axes.plot([p.x for p in own], [p.y for p in own], label=name, **style)
                banded = [p for p in own if p.low is not None and p.high is not None]
                if banded:
                    ends: Any = ([p.x for p in banded], [p.low for p in banded], [p.high for p in banded])
                    axes.fill_between(*ends, color=BLUE, alpha=0.15, lw=0)
            axes.set_title(textwrap.fill(panel.replace("_", " "), TITLE_WIDTH))
        for axes in grid[len(panels) :]:
            axes.remove()
        figure.supxlabel("strength")
        figure.supylabel("difference from the base model")
        found = {
            label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        shown = [name for name in _STYLES if name in found]
        figure.legend([found[name] for name in shown], shown, loc="outside upper center", ncols=3)
    return figure
