"""Activations embedded in a plane, against numpy in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sealign import figures
from sealign.errors import ActivationError, DemonstrationError, SettingError, SiteError
from tests.figure_data import collected, places


@pytest.mark.parametrize(
    ("layers", "expected"), [(range(30), [0, 15, 29]), ([7], [7]), ([2, 6], [2, 6]), ([1, 4, 8, 9], [1, 8, 9])]
)
def test_first_middle_last(layers: Any, expected: list[int]) -> None:
    assert figures.first_middle_last(layers) == expected


def test_tsne_draws_every_activation_once_in_order() -> None:
    points = figures.tsne_points(collected(6))
    expected = [(f"layer {layer}", side) for layer in (0, 4, 9) for side in ("positive", "negative") for _ in range(6)]
    assert [(point.panel, point.series) for point in points] == expected
    assert {point.panel for point in figures.tsne_points(collected(6), (3,))} == {"layer 3"}
    # One row that lies far from all others keeps its place in the list: row 2 moves to the other side.
    swapped = collected(6, layers=(0,))
    swapped.positive[0][2], swapped.negative[0][2] = -swapped.positive[0][2], -swapped.negative[0][2]
    placed = places(figures.tsne_points(swapped, (0,)), "layer 0")
    nearest = np.argsort(np.linalg.norm(placed[2] - placed, axis=1))[1]
    assert nearest in {6, 7, 9, 10, 11}


def test_tsne_keeps_neighbours_and_is_the_same_twice() -> None:
    points = figures.tsne_points(collected(12, shift=6.0), (4,))
    positions = places(points, "layer 4")
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=2) + np.diag([np.inf] * 24)
    assert ((distances.argmin(1) < 12) == (np.arange(24) < 12)).all()
    assert figures.tsne_points(collected(12, shift=6.0), (4,)) == points


@pytest.mark.parametrize(("count", "perplexity"), [(5, 3.0), (9, 17 / 3), (70, 30.0)])
def test_perplexity_is_bounded_by_the_points(count: int, perplexity: float, monkeypatch: pytest.MonkeyPatch) -> None:
    import sklearn.manifold

    seen: dict[str, Any] = {}

    class Recording:
        def __init__(self, **settings: Any) -> None:
            seen.update(settings)

        def fit_transform(self, matrix: Any) -> Any:
            return matrix[:, :2]

    monkeypatch.setattr(sklearn.manifold, "TSNE", Recording)
    figures.tsne_points(collected(count), (3,), seed=8)
    assert seen == {"perplexity": perplexity, "init": "pca", "random_state": 8}


def test_the_number_of_threads_does_not_change_the_result() -> None:
    from threadpoolctl import threadpool_limits

    found = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found.append(figures.tsne_points(collected(20, shift=0.1), (9,)))
    assert found[0] == found[1]


def test_the_plane_of_an_effect_is_that_of_principal_components() -> None:
    before, after = collected(5), collected(5, seed=1)
    points = figures.effect_points(before, after, (9, 0))
    for layer in (9, 0):
        blocks = [before.positive[layer], before.negative[layer], before.neutral[layer], after.neutral[layer]]
        matrix = np.concatenate([block.numpy().astype(np.float64) for block in blocks])
        centered = matrix - matrix.mean(0)
        values, vectors = np.linalg.eigh(centered.T @ centered)
        expected = centered @ vectors[:, [-1, -2]]
        found = places(points, f"layer {layer}:")
        signs = np.sign((found * expected).sum(0))
        np.testing.assert_allclose(found * signs, expected, atol=1e-8)
        share = values[-2:].sum() / values.sum()
        (panel,) = {point.panel for point in points if point.panel.startswith(f"layer {layer}:")}
        assert panel == f"layer {layer}: {share:.0%} of variance"
    series = ("positive", "negative", "neutral", "edited neutral")
    assert [point.series for point in points] == [name for _ in range(2) for name in series for _ in range(5)]


def test_an_effect_by_tsne() -> None:
    before, after = collected(6), collected(6, seed=1)
    points = figures.effect_points(before, after, embedding="tsne", seed=3)
    assert {point.panel for point in points} == {"layer 9"}  # the last one, and no share of variance
    assert len(points) == 24
    assert points == figures.effect_points(before, after, embedding="tsne", seed=3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: figures.tsne(collected(4)),
            DemonstrationError,
            "there are 4 demonstrations, but t-SNE needs at least 5",
        ),
        (lambda: figures.tsne(collected(), (3, 7)), SiteError, r"layers \[7\] were not collected.*\[0, 3, 4, 9\]"),
        (lambda: figures.tsne(collected(), ()), SiteError, "no layer is named"),
        (
            lambda: figures.effect(collected(), collected(layers=(3, 8)), (3, 9)),
            SiteError,
            r"layers \[9\] were not collected; collect them, or name one or more of \[3\]",
        ),
        (
            lambda: figures.effect(collected(), collected(layers=(8,))),
            SiteError,
            r"no layer is named; collect them, or name one or more of \[\]",
        ),
        (
            lambda: figures.effect(collected(6), collected(5)),
            ActivationError,
            r"layer 9: neutrals are \(6, 11\) before and \(5, 11\) after the edit; collect both",
        ),
        (
            lambda: figures.effect(collected(), collected(), embedding="tnse"),  # type: ignore[arg-type]
            SettingError,
            "unknown embedding 'tnse' .did you mean 'tsne'",
        ),
        (lambda: figures.effect(collected(4), collected(4), embedding="tsne"), DemonstrationError, "needs at least 5"),
    ],
)
def test_activations_that_cannot_be_embedded_are_refused(
    call: Callable[[], Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        call()
