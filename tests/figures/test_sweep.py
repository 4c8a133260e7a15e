"""The strength sweep: its points are the differences of the results, and its figure draws all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from sealign.errors import SettingError
from sealign.evaluation.comparison import report_edits
from sealign.figures.points import Point
from sealign.figures.style import svg_text
from sealign.figures.sweep import sweep, sweep_points, sweeps
from tests.evaluation_data import planted_results, planted_sweep


@pytest.fixture(scope="module")
def points() -> list[Point]:
    results = planted_sweep()
    return sweep_points(results, report_edits(results), "mild")


def _curve(points: list[Point], panel: str, series: str) -> list[tuple[float, Any]]:
    return [(point.x, round(point.y, 6)) for point in points if (point.panel, point.series) == (panel, series)]


def test_points_are_the_planted_differences_in_the_order_of_strength(points: list[Point]) -> None:
    panels = list(dict.fromkeys(point.panel for point in points))
    assert panels == [
        "truthfulqa_mc2 mc2",
        "answers mood",
        "loss on neutral text",
        "KL from base on own answers",
        "answers loss",
    ]
    strengths = (0.0, 0.5, 1.0, 2.0)
    for series, slope in (("edited", 0.03), ("random directions", 0.0), ("reversed", -0.03)):
        assert _curve(points, panels[0], series) == [(s, pytest.approx(slope * s, abs=1e-5)) for s in strengths]
    damage = [(s, pytest.approx(0.02 * s**2, abs=1e-5)) for s in strengths]
    assert _curve(points, "loss on neutral text", "edited") == damage
    assert _curve(points, "loss on neutral text", "random directions") == [(s, 0.0) for s in strengths]
    own = np.average([0.1, 0.2], weights=[3, 5])  # the divergence of the planted damage, whatever the strength
    found = _curve(points, "KL from base on own answers", "edited")
    assert found == [(0.0, 0.0), *((s, pytest.approx(own, abs=1e-5)) for s in strengths[1:])]


def test_bands_are_the_intervals_of_the_edit(points: list[Point]) -> None:
    results = planted_sweep()
    (report,) = [report for report in report_edits(results) if report.edit == "mild at 1"]
    difference = report.headlines[0].difference
    assert difference is not None
    found = [p for p in points if (p.panel, p.series, p.x) == ("truthfulqa_mc2 mc2", "edited", 1.0)]
    assert [(p.low, p.high) for p in found] == [(difference.low, difference.high)]
    assert {p.low for p in points if p.series != "edited"} == {None}
    low, high = report.damage["mild at 1"].loss_interval
    (own,) = [p for p in points if (p.panel, p.series, p.x) == ("loss on neutral text", "edited", 1.0)]
    assert (own.low, own.high) == (low, high)


def test_the_figure_has_a_panel_for_each_metric_and_draws_every_point(points: list[Point]) -> None:
    figure = sweep(points)
    assert len(figure.axes) == len({point.panel for point in points})
    drawn = sorted(
        (x, y) for axes in figure.axes for line in axes.lines if not str(line.get_label()).startswith("_")
        for x, y in zip(np.asarray(line.get_xdata()), np.asarray(line.get_ydata()), strict=True)
    )  # fmt: skip
    assert drawn == sorted((point.x, point.y) for point in points)
    assert svg_text(figure) == svg_text(sweep(points))


def test_a_difference_that_is_not_finite_is_left_out() -> None:
    results = planted_sweep()
    results.damage["mild at 2"].edited[0] = None
    found = sweep_points(results, report_edits(results), "mild")
    assert [x for x, _ in _curve(found, "loss on neutral text", "edited")] == [0.0, 0.5, 1.0]


def test_refusals() -> None:
    results = planted_results()
    assert sweeps(results) == []
    with pytest.raises(SettingError, match=r"'mild' was not evaluated at several strengths \(found: none\); run "):
        sweep_points(results, report_edits(results), "mild")
    swept = planted_sweep()
    assert sweeps(swept) == ["mild"]
    with pytest.raises(SettingError, match=r"'other' was not evaluated .*found: mild"):
        sweep_points(swept, report_edits(swept), "other")
    with pytest.raises(SettingError, match="there is nothing to draw"):
        sweep([])
    assert dataclasses.asdict(swept.arms["mild at 2"])["sweep"] == "mild"
