"""Figures of evaluations and of tuning: what they draw, that nothing is cut, and that they are the same twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from sealign.evaluation.comparison import EditReport, report_edits
from sealign.figures.evaluation_figures import (
    categories_figure,
    damage_figure,
    differences_figure,
    gain_damage_figure,
    layer_map_figure,
)
from sealign.figures.style import figure_style, svg_text
from sealign.figures.sweep import sweep, sweep_points
from tests.evaluation_data import planted_results, planted_sweep, with_answers


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
                edit=SimpleNamespace(site=site, method=method, layers=list(layers)),
                config=SimpleNamespace(token=token, layer_weights=None),
            ),
            efficiency=value,
        )
        for site, method, token, layers, value in rows
    ]


@pytest.fixture(scope="module")
def report() -> EditReport:
    (found,) = report_edits(with_answers(planted_results(0.05)))
    return found


FIGURES: dict[str, Callable[[EditReport], Any]] = {
    "differences": differences_figure,
    "damage": lambda report: damage_figure(report, 0.05),
    "gain": lambda report: gain_damage_figure([report], 0.05),
    "gain on own answers": lambda report: gain_damage_figure([report], 0.05, own_answers=True),
    "gain at several strengths": lambda _: gain_damage_figure(report_edits(planted_sweep()), 0.05),
    "sweep": lambda _: sweep(sweep_points(planted_sweep(), report_edits(planted_sweep()), "mild")),
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


@pytest.mark.parametrize("own_answers", [False, True])
def test_gain_against_damage_shows_every_arm_with_its_intervals(report: EditReport, own_answers: bool) -> None:
    (axes,) = gain_damage_figure([report], 0.05, own_answers=own_answers).axes
    places = {line.get_label(): line for line in axes.lines if line.get_linestyle() == "None"}
    row = report.main
    assert row is not None
    assert row.metric == "mc2"
    measured = report.domain_damage if own_answers else report.damage

    def value(*names: str) -> float:
        damages = [measured[name] for name in names]
        return float(np.mean([each.mean_divergence if own_answers else each.loss_increase for each in damages]))

    expected = {
        "base": (0.0, 0.0),
        "edited": (value("mild"), row.difference),
        "mean of random directions": (value("mild random 0", "mild random 1"), row.random),
        "reversed": (value("mild reversed"), row.reversed),
    }
    assert set(places) == set(expected)
    for label, (x, gain) in expected.items():
        y = gain if isinstance(gain, float) else gain.difference if gain is not None else None
        found = places[label]
        assert (np.asarray(found.get_xdata())[0], np.asarray(found.get_ydata())[0]) == (x, y)
    assert row.difference is not None
    ends = [tuple(np.asarray(line.get_ydata())) for line in axes.lines]
    assert (row.difference.low, row.difference.high) in ends
    assert bool([line for line in axes.lines if "budget" in str(line.get_label())]) is not own_answers


def test_a_lower_score_is_a_gain_if_the_aim_is_lower() -> None:
    results = planted_results(-0.05)
    task = results.tasks["truthfulqa_mc2"]
    task.metrics["mc2"] = dataclasses.replace(task.metrics["mc2"], aim="lower")
    (report,) = report_edits(results)
    (axes,) = gain_damage_figure([report], 0.05).axes
    (edited,) = [line for line in axes.lines if line.get_label() == "edited"]
    assert np.asarray(edited.get_ydata())[0] == pytest.approx(0.05, abs=0.01)
    assert axes.get_ylabel() == "gain in mc2"


def test_a_damage_that_is_not_finite_is_left_out_of_the_gain() -> None:
    results = planted_results(0.05)
    results.damage["mild"].edited[0] = None
    (axes,) = gain_damage_figure(report_edits(results), 0.05).axes
    assert "edited" not in {line.get_label() for line in axes.lines}


def test_no_metric_with_an_aim_is_an_empty_figure_without_a_warning(report: EditReport) -> None:
    rows = [dataclasses.replace(row, headline=False) for row in report.rows]
    assert len(differences_figure(dataclasses.replace(report, rows=rows)).axes) == 1
