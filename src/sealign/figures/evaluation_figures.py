"""Figures of evaluations and of tuning: differences with intervals, categories, damage, efficiency by layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sealign.evaluation.comparison import EditReport, Row
from sealign.evaluation.scan import ScannedCandidate
from sealign.evaluation.statistics import Difference
from sealign.figures.style import BLUE, COLUMN_WIDTH, GREEN, ORANGE, PAGE_WIDTH, PINK, RED, figure_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ARMS: Mapping[str, tuple[str, str, str]] = {
    "edit": ("o", "black", "black"),
    "random": ("s", "0.45", "white"),
    "reversed": ("X", "0.45", "0.75"),
}
"""By arm: marker, colour of the line, and fill of the marker."""

LAYER_MAP_NAME = "layer_map"
"""File name, without suffix, of the layer map among the figures of a search."""

DAMAGE_LABEL = "increase of the mean loss on neutral text (nats per token)"
SHORT_DAMAGE_LABEL = "loss increase on neutral text (nats per token)"


def differences_figure(report: EditReport) -> Figure:
    """Return a forest plot of the differences of headline metrics from the base model, with 95 % intervals.

    Each metric has a row for the edit, the mean of its random controls, and the reversed edit.

    Args:
        report: Statistics of an edit.
    """
    rows = [row for row in report.headlines if row.difference is not None]
    with _new_figure(1.2 + 0.62 * max(1, len(rows))) as (figure, axes):
        axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        shown: set[str] = set()
        for position, row in enumerate(rows):
            arms = {"edit": row.difference, "random": row.random, "reversed": row.reversed}
            for offset, (arm, difference) in zip((-0.22, 0.0, 0.22), arms.items(), strict=True):
                if difference is not None:
                    _point(axes, difference, position + offset, arm, label=arm not in shown)
                    shown.add(arm)
        axes.set_yticks(range(len(rows)), [row.name.replace(" ", "\n", 1) for row in rows])
        axes.set_ylim(max(1, len(rows)) - 0.5, -0.5)
        axes.set_xlabel("difference from the base model with 95 % interval")
        if shown:
            figure.legend(loc="outside upper center", ncols=3)
    return figure


def _point(axes: Axes, difference: Difference, height: float, arm: str, *, label: bool) -> None:
    marker, line, fill = _ARMS[arm]
    names = {"edit": "edited", "random": "mean of random directions", "reversed": "reversed"}
    axes.plot([difference.low, difference.high], [height, height], color=line, linewidth=1.4)
    axes.plot(
        [difference.difference], [height], marker, color=line, markerfacecolor=fill, markersize=5.5,
        label=names[arm] if label else None, linestyle="none",
    )  # fmt: skip


def categories_figure(rows: list[Row]) -> Figure:
    """Return a bar chart of the base model and the edited model in each subgroup of one metric.

    Args:
        rows: Rows of the subgroups, at least 1, all of one metric.
    """
    metric = rows[0].metric.partition("/")[0]
    with _new_figure(1.2 + 0.42 * len(rows)) as (figure, axes):
        styles: tuple[tuple[str, float, Any], ...] = (
            ("base", -0.19, {"color": "0.82", "edgecolor": "0.3"}),
            ("edited", 0.19, {"color": "0.45", "edgecolor": "black", "hatch": "///"}),
        )
        for arm, offset, style in styles:
            places = [position + offset for position in range(len(rows))]
            bars = axes.barh(places, [getattr(row, arm) for row in rows], 0.36, label=arm, **style)
            axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        aim = rows[0].aim
        if isinstance(aim, float):
            axes.axvline(aim, color="black", linewidth=0.8, linestyle=":", label=f"unbiased: {aim:g}")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [row.metric.partition("/")[2].replace("_", " ") for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(f"{rows[0].task}: {metric.replace('_', ' ')}")
        figure.legend(loc="outside upper center", ncols=3)
    return figure


def damage_figure(report: EditReport, max_damage: float) -> Figure:
    """Return a bar chart of the damage of an edit and of its controls, with the budget.

    Args:
        report: Statistics of an edit.
        max_damage: Budget, in nats per token.
    """
    names = list(report.damage)
    with _new_figure(1.1 + 0.34 * len(names)) as (figure, axes):
        for position, name in enumerate(names):
            own = name == report.edit
            value = report.damage[name].loss_increase
            label, width = (f" {value:+.3f}", value) if math.isfinite(value) else (" not finite", 0.0)
            axes.barh(position, width, 0.6, color="0.3" if own else "0.82", edgecolor="black")
            axes.annotate(label, (max(width, 0), position), va="center")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.axvline(max_damage, color="black", linewidth=1, linestyle="--", label=f"budget {max_damage:g}")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel(DAMAGE_LABEL)
        figure.legend(loc="outside upper center")
    return figure


@dataclass(frozen=True)
class _Place:
    """A point with the ends of its intervals."""

    x: float
    y: float
    width: tuple[float, float]
    height: tuple[float, float]


def gain_damage_figure(reports: Sequence[EditReport], max_damage: float, *, own_answers: bool = False) -> Figure:
    """Return the gain of one metric against the damage: base model, edit, random directions and reversed edit.

    The gain is the difference of ``EditReport.main`` from the base model, in the direction that is good. The damage is
    the increase of the loss on neutral text, or the KL divergence on the base model's own answers. Both have 95 %
    intervals; those of random directions are of the mean gain of all controls.

    Args:
        reports: Statistics of an edit, or of one edit at several strengths, which a line joins.
        max_damage: Budget of the damage on neutral text, in nats per token.
        own_answers: Whether the damage is the divergence on own answers.
    """
    names = {"edit": "edited", "random": "mean of random directions", "reversed": "reversed"}
    row = next((report.main for report in reports if report.main is not None), None)
    with figure_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(COLUMN_WIDTH, 3.0))
        axes = figure.add_subplot()
        axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        axes.plot([0], [0], "D", color="black", markersize=5, label="base", linestyle="none")
        for arm, label in names.items():
            marker, line, fill = _ARMS[arm]
            places = [place for report in reports if (place := _place(report, arm, own_answers)) is not None]
            if len(places) > 1:
                axes.plot([0, *(p.x for p in places)], [0, *(p.y for p in places)], color=line, linewidth=0.7, zorder=1)
            for number, place in enumerate(places):
                axes.plot(place.width, [place.y, place.y], color=line, linewidth=1)
                axes.plot([place.x, place.x], place.height, color=line, linewidth=1)
                axes.plot(
                    [place.x], [place.y], marker, color=line, markerfacecolor=fill, markersize=6, linestyle="none",
                    label=None if number else label,
                )  # fmt: skip
        if not own_answers:
            axes.axvline(max_damage, color="black", linewidth=1, linestyle="--", label=f"budget {max_damage:g}")
        name = "metric" if row is None else row.metric.replace("_", " ")
        axes.set_ylabel(f"gain in {name}" if row is None or isinstance(row.aim, str) else f"change of {name}")
        axes.set_xlabel("KL from base on own answers (nats per token)" if own_answers else SHORT_DAMAGE_LABEL)
        figure.legend(loc="outside upper center", ncols=2)
    return figure


def _place(report: EditReport, arm: str, own_answers: bool) -> _Place | None:
    """Return where an arm lies; None if it was not measured or is not finite."""
    row = report.main
    if row is None:
        return None
    difference = {"edit": row.difference, "random": row.random, "reversed": row.reversed}[arm]
    measured = report.domain_damage if own_answers else report.damage
    damages = [damage for name, damage in measured.items() if _kind(name, report.edit) == arm]
    if difference is None or not damages:
        return None
    values = [damage.mean_divergence if own_answers else damage.loss_increase for damage in damages]
    ends = [damage.divergence_interval if own_answers else damage.loss_interval for damage in damages]
    x, low, high = (float(np.mean(column)) for column in (values, *zip(*ends, strict=True)))
    if not math.isfinite(x):
        return None
    heights = sorted((row.sign * difference.low, row.sign * difference.high))
    return _Place(x, row.sign * difference.difference, (low, high), (heights[0], heights[1]))


def _kind(name: str, edit: str) -> str:
    """Return whether an arm in the damage of an edit is the edit or one of its controls."""
    if name == edit:
        return "edit"
    return "reversed" if name == f"{edit} reversed" else "random"


_SITES = ("residual", "mlp", "attention")
_METHOD_COLORS = (BLUE, RED, GREEN, ORANGE, PINK)


def layer_map_figure(scanned: Sequence[ScannedCandidate], winner: ScannedCandidate | None = None) -> Figure:
    """Return the efficiency of each method by layer, one panel for each site.

    Of several settings of a method, each layer shows the most efficient one.

    Args:
        scanned: The scan.
        winner: Candidate to mark, or None.
    """
    sites = [site for site in _SITES if any(each.candidate.edit.site == site for each in scanned)]
    curves = _curves(scanned)
    colors = dict(zip(dict.fromkeys(method for _, method, _ in curves), itertools.cycle(_METHOD_COLORS), strict=False))
    dashes = dict(
        zip(dict.fromkeys(token for *_, token in curves), itertools.cycle(["-", "--", ":", "-."]), strict=False)
    )
    with figure_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(PAGE_WIDTH, 3.0))
        panels = figure.subplots(1, max(1, len(sites)), sharey=True, squeeze=False)[0]
        for panel, site in zip(panels, sites, strict=False):
            panel.axhline(0, color="0.6", linewidth=0.8, zorder=0)
            for (where, method, token), points in curves.items():
                if where == site:
                    layers, values = zip(*sorted(points.items()), strict=True)
                    marker = "o" if len(layers) == 1 else None
                    panel.plot(
                        layers, values, color=colors[method], linestyle=dashes[token], marker=marker, markersize=4,
                        linewidth=1.2, label=f"{method.replace('_', ' ')}, {token} token",
                    )  # fmt: skip
            if winner is not None and winner.candidate.edit.site == site:
                joined = winner.candidate.edit.layers  # of a combination, joined by a line
                panel.plot(joined, [winner.efficiency] * len(joined), "*:", color="black", markersize=11, linewidth=0.8)
            panel.set_title(f"{site} (layer)")
        panels[0].set_ylabel("efficiency: gain / sqrt(2 KL)")
        found = {
            label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        if found:
            figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=3)
    return figure


def _curves(scanned: Sequence[ScannedCandidate]) -> dict[tuple[str, str, str], dict[int, float]]:
    """Return the largest efficiency by layer, for each site, method and token choice."""
    curves: dict[tuple[str, str, str], dict[int, float]] = {}
    for each in scanned:
        edit = each.candidate.edit
        if each.candidate.config.layer_weights is not None:
            continue  # a combination of layers that are shown themselves
        points = curves.setdefault((edit.site, edit.method, each.candidate.config.token), {})
        # An edit of several layers is shown at the first.
        points[edit.layers[0]] = max(points.get(edit.layers[0], -math.inf), each.efficiency)
    return dict(sorted(curves.items()))


@contextmanager
def _new_figure(height: float) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure of the width of a page, and its axes, with the style applied."""
    from matplotlib.figure import Figure

    with figure_style():
        figure = Figure(figsize=(PAGE_WIDTH, height))
        yield figure, figure.add_subplot()
