"""Points of spectra, signatures and scores, against numpy in float64."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sealign
from sealign import figures
from sealign.errors import SettingError
from sealign.figures import Point
from sealign.fitting.layer_statistics import LayerStatistics
from sealign.methods.sea import decompose
from tests.figure_data import FIGURES, LAYERS, SCORES, SPECTRA, WIDTH, collected


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("count", [6, 17])
def test_spectra_of_activations(count: int, centered: bool) -> None:
    activations = collected(count)
    spectra = figures.activation_spectra(activations, centered=centered)
    assert sorted(spectra) == list(LAYERS)
    for layer in LAYERS:
        for found, target in zip(spectra[layer], (activations.positive, activations.negative), strict=True):
            x, y = (block[layer].numpy().astype(np.float64) for block in (activations.neutral, target))
            if centered:
                x, y = x - x.mean(0), y - y.mean(0)
            rank = min(count - centered, WIDTH)
            expected = np.linalg.svd(x.T @ y / count, compute_uv=False)
            assert len(found) == rank  # what is left of centring by rounding is not drawn
            np.testing.assert_allclose(found, expected[:rank], rtol=1e-9)


def test_spectra_of_activations_are_those_that_a_fit_decomposes() -> None:
    activations = collected(6)
    statistics = LayerStatistics(WIDTH, centered=True)
    statistics.update(*activations.rows(3))
    _, *spectra = decompose(statistics, sealign.SEAConfig(rank=2, centered=True))
    fresh = figures.activation_spectra(activations, centered=True)
    for found, expected in zip(spectra, fresh[3], strict=True):
        assert len(found.values) >= 2
        torch.testing.assert_close(found.values[:2], expected[:2], rtol=1e-6, atol=0)


def test_points_of_a_spectrum() -> None:
    assert [dataclasses.astuple(point)[:4] for point in figures.spectrum_points(SPECTRA)] == [
        *[("positives", "layer 2", i, value) for i, value in ((1, 9.0), (2, 1.0))],
        *[("positives", "layer 5", i, value) for i, value in ((1, 4.0), (2, 2.0), (3, 0.5))],
        *[("negatives", "layer 2", i, value) for i, value in ((1, 8.0), (2, 2.0), (3, 1.0), (4, 0.25))],
        ("negatives", "layer 5", 1, 3.0),
    ]


@pytest.mark.parametrize(
    ("spectra", "words"),
    [
        ({}, "nothing to draw"),
        ({1: (torch.tensor([2.0, 0.0]), torch.ones(1))}, "'layer 1' is 0.0 at 2, but it must be finite and above 0"),
        ({1: (torch.tensor([float("nan")]), torch.ones(1))}, "'layer 1' is nan at 1"),
    ],
)
def test_invalid_spectra_are_refused(spectra: Any, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        figures.spectrum(spectra)


def test_centred_signatures_are_those_of_the_difference_of_means() -> None:
    activations = collected(5)
    for layer, value in figures.activation_signatures(activations, centered=True).items():
        gap = activations.positive[layer].double().mean(0) - activations.negative[layer].double().mean(0)
        assert value == pytest.approx(float(gap.norm()) / np.sqrt(8))


def test_points_of_signatures() -> None:
    activations = {"a": collected(5), "b": collected(8, layers=(1, 2))}
    signatures = {name: figures.activation_signatures(found) for name, found in activations.items()}
    points = figures.signature_points(signatures, depths={"b": 30})
    assert [(point.series, point.x) for point in points] == [
        *[("a", depth) for depth in (0.1, 0.4, 0.5, 1.0)],
        ("b", 2 / 30),
        ("b", 3 / 30),
    ]
    for point in points:
        found = activations[point.series]
        layer = round(point.x * (10 if point.series == "a" else 30)) - 1
        stacked = np.concatenate([found.positive[layer].numpy(), found.negative[layer].numpy()]).astype(np.float64)
        labels = np.repeat(np.eye(2), len(stacked) // 2, axis=0)
        expected = np.linalg.svd(stacked.T @ labels / len(stacked), compute_uv=False).sum()
        assert point.y == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("signatures", "words"),
    [
        ({}, "nothing to draw"),
        ({"a": {}}, "last layer of 'a' is -1"),
        ({"a": {12: 1.0}}, r"last layer of 'a' is 12, but it must be in \[0, 11\]"),
        ({"b": {0: 0.0, 1: 2.0}}, "'b' is 0.0 at 0.5, but it must be finite and above 0 for a logarithmic axis"),
        ({"b": {0: 1.0, 1: float("inf")}}, "'b' is inf at 1, but it must be finite"),
    ],
)
def test_invalid_signatures_are_refused(signatures: Any, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        figures.signature(signatures, depths={"a": 12})


def test_points_of_scores() -> None:
    points = figures.score_points(*SCORES, base=0.375)
    assert {point.series for point in points[:3]} == {"edited: mean and range of 1 to 3 runs"}
    assert [dataclasses.astuple(point)[2:] for point in points[:3]] == [
        (25, 0.25, 0.25, 0.25),
        (50, 0.4375, 0.375, 0.5),
        (100, 0.5, 0.25, 0.75),
    ]
    base = [Point("", "base model", x, 0.375) for x in (25, 100)]
    assert points[3:] == base
    same = figures.score_points([8, 9], [[1.0, 2.0], [3.0, 4.0]], base=0.0)
    assert same[0].series == "edited: mean and range of 2 runs"


@pytest.mark.parametrize(
    ("counts", "scores"),
    [
        ([], []),
        ([25], [[0.5]]),
        ([25, 50], [[0.5]]),
        ([25, 25], [[0.5], [0.6]]),
        ([25, 50], [[0.5], []]),
        ([0, 50], [[0.5], [0.6]]),
    ],
)
def test_too_few_scores_for_a_curve_are_refused(counts: Any, scores: Any) -> None:
    with pytest.raises(SettingError, match="a curve needs at least 1 run at each of at least 2 different numbers"):
        figures.score_by_demonstrations(counts, scores, base=0.5)


@pytest.mark.parametrize("name", FIGURES)
def test_points_as_csv(name: str, tmp_path: Path) -> None:
    points = FIGURES[name][1]()
    path = figures.save_points(points, tmp_path / "new" / name)
    assert path == tmp_path / "new" / f"{name}.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["panel", "series", "x", "y"] + (["low", "high"] if name == "score" else [])

    def number(text: str | None) -> float | None:
        return float(text) if text else None

    assert points == [
        Point(r["panel"], r["series"], float(r["x"]), float(r["y"]), number(r.get("low")), number(r.get("high")))
        for r in rows
    ]
    assert b"\r" not in path.read_bytes()
