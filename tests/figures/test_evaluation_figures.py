"""Figures of evaluations and of tuning: what they draw, that nothing is cut, and that they are the same twice."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from sealign.evaluation.comparison import EditReport, report_edits
from sealign.figures.evaluation_figures import categories_figure, damage_figure, differences_figure, layer_map_figure
from sealign.figures.style import figure_style, svg_text
from tests.evaluation_data import planted_results


def _scanned() -> list[Any]:
    """Two methods and token choices at two sites, and one edit of several layers."""
    rows = [("residual", "sea", "last", (layer,), 0.1 * layer - 0.2) for layer in (1, 2, 4)] + [
        ("residual", "mean_difference", "completion", (2,), 0.5),
        ("residual", "mean_difference", "completion", (2,), 0.3),  # with other settings; the larger one is drawn
        ("attention", "iti", "last", (1, 3), 0.25),
    ]
    return [
        SimpleNamespace(
            candidate=SimpleNamespace(
                edit=SimpleNamespace(site=site, method=method, layers=list(layers)), config=SimpleNamespace(token=token)
            ),
            efficiency=value,
        )
        for site, method, token, layers, value in rows
    ]


@pytest.fixture(scope="module")
def report() -> EditReport:
    (found,) = report_edits(planted_results(0.05))
    return found


FIGURES: dict[str, Callable[[EditReport], Any]] = {
    "differences": differences_figure,
    "damage": lambda report: damage_figure(report, 0.05),
    "categories": lambda report: categories_figure([row for row in report.rows if "/" in row.metric]),
    "layer map": lambda _: layer_map_figure(_scanned(), _scanned()[3]),
    "no winner": lambda _: layer_map_figure(_scanned()),
    "no candidates": lambda _: layer_map_figure([]),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_the_same_twice_and_nothing_is_cut(name: str, report: EditReport) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = FIGURES[name](report)
    text = svg_text(figure)
    assert "<svg" in text
    assert text == svg_text(FIGURES[name](report))
    with figure_style():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        box = figure.get_tightbbox(canvas.get_renderer())  # in inches
    assert min(box.x0, box.y0) >= -0.01
    assert box.x1 <= figure.get_figwidth() + 0.01
    assert box.y1 <= figure.get_figheight() + 0.01


def test_differences_show_the_edit_and_its_controls(report: EditReport) -> None:
    (axes,) = differences_figure(report).axes
    points = [np.asarray(line.get_xdata())[0] for line in axes.lines if line.get_linestyle() == "None"]
    expected = [
        difference.difference
        for row in report.headlines
        for difference in (row.difference, row.random, row.reversed)
        if difference is not None
    ]
    assert points == expected
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        row.name.replace(" ", "\n", 1) for row in report.headlines
    ]


def test_damage_shows_all_arms_and_the_budget(report: EditReport) -> None:
    (axes,) = damage_figure(report, 0.05).axes
    widths = [bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle)]
    assert widths == [damage.loss_increase for damage in report.damage.values()]
    assert axes.get_xlabel() == "increase of the mean loss on neutral text (nats per token)"
    assert any(list(np.asarray(line.get_xdata())) == [0.05, 0.05] for line in axes.lines)
