"""Figures of evaluations and of tuning: differences with intervals, categories, damage, trials."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sealign.evaluation.comparison import EditReport, Row
from sealign.evaluation.statistics import Difference
from sealign.evaluation.trials import TrialRecord
from sealign.figures.style import PAGE_WIDTH, figure_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ARMS: Mapping[str, tuple[str, str, str]] = {
    "edit": ("o", "black", "black"),
    "random": ("s", "0.45", "white"),
    "reversed": ("X", "0.45", "0.75"),
}
"""By arm: marker, colour of the line, and fill of the marker."""

DAMAGE_LABEL = "increase of the mean loss on neutral text (nats per token)"


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
        axes.set_ylim(len(rows) - 0.5, -0.5)
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
            axes.barh(position, value, 0.6, color="0.3" if own else "0.82", edgecolor="black")
            axes.annotate(f" {value:+.3f}", (max(value, 0), position), va="center")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.axvline(max_damage, color="black", linewidth=1, linestyle="--", label=f"budget {max_damage:g}")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel(DAMAGE_LABEL)
        figure.legend(loc="outside upper center")
    return figure


def frontier_figure(trials: Sequence[TrialRecord], winner: TrialRecord | None, max_damage: float) -> Figure:
    """Return a scatter plot of gain on the development items against damage, for all trials of a study.

    Args:
        trials: Trials of the study.
        winner: The winning trial, or None.
        max_damage: Budget, in nats per token.
    """
    with _new_figure(4.2) as (figure, axes):
        for state, marker, fill in (("complete", "o", "0.55"), ("pruned", "x", "0.7")):
            points = sorted(t.point for t in trials if t.state == state and t.point is not None)
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=fill, linestyle="none", label=state)
            if points and state == "complete":
                damages, gains = zip(*points, strict=True)
                best = [max(gains[: end + 1]) for end in range(len(gains))]
                axes.step(damages, best, where="post", color="black", linewidth=1, label="frontier")
        if winner is not None and winner.point is not None:
            axes.plot(*winner.point, "*", color="black", markersize=13, linestyle="none", label="winner")
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.axvline(max_damage, color="black", linewidth=1, linestyle="--", label=f"budget {max_damage:g}")
        axes.set_xlabel(DAMAGE_LABEL)
        axes.set_ylabel("gain on the development items")
        figure.legend(loc="outside upper center", ncols=5)
    return figure


@contextmanager
def _new_figure(height: float) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure of the width of a page, and its axes, with the style applied."""
    from matplotlib.figure import Figure

    with figure_style():
        figure = Figure(figsize=(PAGE_WIDTH, height))
        yield figure, figure.add_subplot()
