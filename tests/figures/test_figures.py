"""Figures by the data that they draw, against numpy in float64; and what makes them legible in grey."""

from __future__ import annotations

import csv
import dataclasses
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sealign
from sealign import figures
from sealign.errors import ActivationError, DemonstrationError, SettingError, SiteError
from sealign.figures import Mark, drawing
from sealign.fitting.activations import Activations
from sealign.methods.sea import fit_projection, layer_signatures

LAYERS = (0, 3, 4, 9)
WIDTH = 11


def collected(count: int = 7, *, layers: tuple[int, ...] = LAYERS, shift: float = 3.0, seed: int = 0) -> Activations:
    """Activations of several layers; positives and negatives lie apart by twice the shift."""
    generator = torch.Generator().manual_seed(seed)

    def block(offset: float) -> dict[int, torch.Tensor]:
        direction = torch.ones(WIDTH) * offset
        return {layer: torch.randn(count, WIDTH, generator=generator) + direction * (layer + 1) for layer in layers}

    return Activations("mlp", block(0.5), block(shift), block(-shift))


def places(marks: list[Mark], panel: str, *series: str) -> np.ndarray:
    """The (x, y) of some series of a panel."""
    return np.array([(m.x, m.y) for m in marks if m.panel.startswith(panel) and (not series or m.series in series)])


def drawn(figure: Any) -> list[tuple[str, str, float, float]]:
    """What the lines of a figure hold: title of the panel, series, x, y."""
    return [
        (axes.get_title().replace("\n", ": "), line.get_label(), x, y)
        for axes in figure.axes
        for line in axes.lines
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    ]


def lightness(color: Any) -> float:
    """The luma of a colour, from 0 (black) to 1 (white): what is left of it in grey."""
    from matplotlib.colors import to_rgb

    return float(np.dot(to_rgb(color), (0.299, 0.587, 0.114)))


SPECTRA = {
    5: (torch.tensor([4.0, 2.0, 0.5]), torch.tensor([3.0])),
    2: (torch.tensor([9.0, 1.0]), torch.tensor([8.0, 2.0, 1.0, 0.25])),
}
SIGNATURES = {"truth": {0: 0.5, 1: 2.0, 3: 1.0}, "bias, in a name that is rather long for a legend": {4: 0.25, 9: 0.75}}
SCORES = ([100, 25, 50], [[0.5, 0.75, 0.25], [0.25], [0.5, 0.375]])

FIGURES: dict[str, tuple[Callable[[], Any], Callable[[], list[Mark]]]] = {
    "tsne": (lambda: figures.tsne(collected()), lambda: figures.tsne_points(collected())),
    "effect": (
        lambda: figures.effect(collected(), collected(seed=1), (0, 3, 9)),
        lambda: figures.effect_points(collected(), collected(seed=1), (0, 3, 9)),
    ),
    "effect-tsne": (
        lambda: figures.effect(collected(), collected(seed=1), method="tsne"),
        lambda: figures.effect_points(collected(), collected(seed=1), method="tsne"),
    ),
    "spectrum": (lambda: figures.spectrum(SPECTRA), lambda: figures.spectrum_points(SPECTRA)),
    "one-layer": (lambda: figures.spectrum({5: SPECTRA[5]}), lambda: figures.spectrum_points({5: SPECTRA[5]})),
    "signature": (lambda: figures.signature(SIGNATURES), lambda: figures.signature_points(SIGNATURES)),
    "score": (
        lambda: figures.score_by_demonstrations(*SCORES, base=0.375, metric="accuracy"),
        lambda: figures.score_points(*SCORES, base=0.375),
    ),
}


# --- activations in a plane ---


def test_importing_is_light() -> None:
    code = (
        "import sys, sealign.figures; print([n for n in ('matplotlib', 'sklearn', 'transformers') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("layers", "expected"), [(range(30), [0, 15, 29]), ([7], [7]), ([2, 6], [2, 6]), ([1, 4, 8, 9], [1, 8, 9])]
)
def test_first_middle_last(layers: Any, expected: list[int]) -> None:
    assert figures.first_middle_last(layers) == expected


def test_tsne_draws_every_activation_once_in_order() -> None:
    marks = figures.tsne_points(collected(6))
    expected = [(f"layer {layer}", side) for layer in (0, 4, 9) for side in ("positive", "negative") for _ in range(6)]
    assert [(mark.panel, mark.series) for mark in marks] == expected
    assert {mark.panel for mark in figures.tsne_points(collected(6), (3,))} == {"layer 3"}
    # One row that lies far from all others keeps its place in the list: row 2 moves to the other side.
    swapped = collected(6, layers=(0,))
    swapped.positive[0][2], swapped.negative[0][2] = -swapped.positive[0][2], -swapped.negative[0][2]
    points = places(figures.tsne_points(swapped, (0,)), "layer 0")
    nearest = np.argsort(np.linalg.norm(points[2] - points, axis=1))[1]
    assert nearest in {6, 7, 9, 10, 11}


def test_tsne_keeps_neighbours_and_is_the_same_twice() -> None:
    marks = figures.tsne_points(collected(12, shift=6.0), (4,))
    points = places(marks, "layer 4")
    distances = np.linalg.norm(points[:, None] - points[None], axis=2) + np.diag([np.inf] * 24)
    assert ((distances.argmin(1) < 12) == (np.arange(24) < 12)).all()
    assert figures.tsne_points(collected(12, shift=6.0), (4,)) == marks


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


def test_threads_do_not_change_the_picture() -> None:
    from threadpoolctl import threadpool_limits

    found = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found.append(figures.tsne_points(collected(20, shift=0.1), (9,)))
    assert found[0] == found[1]


def test_the_plane_of_an_effect_is_that_of_principal_components() -> None:
    before, after = collected(5), collected(5, seed=1)
    marks = figures.effect_points(before, after, (9, 0))
    for layer in (9, 0):
        blocks = [before.positive[layer], before.negative[layer], before.neutral[layer], after.neutral[layer]]
        matrix = np.concatenate([block.numpy().astype(np.float64) for block in blocks])
        centered = matrix - matrix.mean(0)
        values, vectors = np.linalg.eigh(centered.T @ centered)
        expected = centered @ vectors[:, [-1, -2]]
        found = places(marks, f"layer {layer}:")
        signs = np.sign((found * expected).sum(0))
        np.testing.assert_allclose(found * signs, expected, atol=1e-8)
        share = values[-2:].sum() / values.sum()
        (panel,) = {mark.panel for mark in marks if mark.panel.startswith(f"layer {layer}:")}
        assert panel == f"layer {layer}: {share:.0%} of variance"
    series = ("positive", "negative", "neutral", "edited neutral")
    assert [mark.series for mark in marks] == [name for _ in range(2) for name in series for _ in range(5)]


def test_an_effect_by_tsne() -> None:
    before, after = collected(6), collected(6, seed=1)
    marks = figures.effect_points(before, after, method="tsne", seed=3)
    assert {mark.panel for mark in marks} == {"layer 9"}  # the last one, and no share of variance
    assert len(marks) == 24
    assert marks == figures.effect_points(before, after, method="tsne", seed=3)


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
            lambda: figures.effect(collected(), collected(), method="tnse"),  # type: ignore[arg-type]
            SettingError,
            "unknown method 'tnse' .did you mean 'tsne'",
        ),
        (lambda: figures.effect(collected(4), collected(4), method="tsne"), DemonstrationError, "needs at least 5"),
    ],
)
def test_what_cannot_be_laid_in_a_plane(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


# --- spectra ---


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


def test_spectra_of_an_edit_are_those_of_its_activations() -> None:
    activations = collected(6)
    projections = {
        layer: fit_projection(
            activations.neutral[layer], activations.positive[layer], activations.negative[layer], rank=2, centered=True
        )
        for layer in (3, 4)
    }
    saved = figures.projection_spectra(projections)
    fresh = figures.activation_spectra(activations, centered=True)
    assert sorted(saved) == [3, 4]
    for layer in saved:
        for found, expected in zip(saved[layer], fresh[layer], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_points_of_a_spectrum() -> None:
    assert [dataclasses.astuple(mark)[:4] for mark in figures.spectrum_points(SPECTRA)] == [
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
def test_what_is_no_spectrum(spectra: Any, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        figures.spectrum(spectra)


# --- signatures and scores ---


def test_points_of_signatures() -> None:
    activations = {"a": collected(5), "b": collected(8, layers=(1, 2))}
    signatures = {name: layer_signatures(found) for name, found in activations.items()}
    marks = figures.signature_points(signatures, depths={"b": 30})
    assert [(mark.series, mark.x) for mark in marks] == [
        *[("a", depth) for depth in (0.1, 0.4, 0.5, 1.0)],
        ("b", 2 / 30),
        ("b", 3 / 30),
    ]
    for mark in marks:
        found = activations[mark.series]
        layer = round(mark.x * (10 if mark.series == "a" else 30)) - 1
        stacked = np.concatenate([found.positive[layer].numpy(), found.negative[layer].numpy()]).astype(np.float64)
        labels = np.repeat(np.eye(2), len(stacked) // 2, axis=0)
        expected = np.linalg.svd(stacked.T @ labels / len(stacked), compute_uv=False).sum()
        assert mark.y == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("signatures", "words"),
    [
        ({}, "nothing to draw"),
        ({"a": {}}, "last layer of 'a' is -1"),
        ({"a": {12: 1.0}}, r"last layer of 'a' is 12, but must be in \[0, 11\]"),
        ({"b": {0: 0.0, 1: 2.0}}, "'b' is 0.0 at 0.5, but it must be finite and above 0, on a log axis"),
        ({"b": {0: 1.0, 1: float("inf")}}, "'b' is inf at 1, but it must be finite"),
    ],
)
def test_what_is_no_signature(signatures: Any, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        figures.signature(signatures, depths={"a": 12})


def test_points_of_scores() -> None:
    marks = figures.score_points(*SCORES, base=0.375)
    assert {mark.series for mark in marks[:3]} == {"edited: mean, and range of 1 to 3 runs"}
    assert [dataclasses.astuple(mark)[2:] for mark in marks[:3]] == [
        (25, 0.25, 0.25, 0.25),
        (50, 0.4375, 0.375, 0.5),
        (100, 0.5, 0.25, 0.75),
    ]
    base = [Mark("", "base model", x, 0.375) for x in (25, 100)]
    assert marks[3:] == base
    same = figures.score_points([8, 9], [[1.0, 2.0], [3.0, 4.0]], base=0.0)
    assert same[0].series == "edited: mean, and range of 2 runs"


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
def test_what_is_no_curve_of_scores(counts: Any, scores: Any) -> None:
    with pytest.raises(SettingError, match="a curve needs at least 1 run at each of at least 2 different numbers"):
        figures.score_by_demonstrations(counts, scores, base=0.5)


def test_the_band_is_the_range() -> None:
    figure = figures.score_by_demonstrations(*SCORES, base=0.375)
    (band,) = figure.axes[0].collections
    corners = {(float(x), float(y)) for x, y in band.get_paths()[0].vertices}
    assert {(100, 0.25), (100, 0.75), (50, 0.375), (50, 0.5), (25, 0.25)} == corners


# --- drawing ---


@pytest.mark.parametrize("name", FIGURES)
def test_figures_draw_their_points_at_the_width_of_a_column(name: str) -> None:
    build, points = FIGURES[name]
    figure = build()
    assert sorted(drawn(figure)) == sorted((m.panel, m.series, m.x, m.y) for m in points())
    assert figure.get_figwidth() == 3.5
    assert figure.get_supxlabel()
    assert figure.get_supylabel()


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_legible_and_nothing_is_cut(name: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    figure = FIGURES[name][0]()
    with drawing._style():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        box = figure.get_tightbbox(canvas.get_renderer())  # in inches
    assert min(box.x0, box.y0) >= 0
    assert box.x1 <= figure.get_figwidth()
    assert box.y1 <= figure.get_figheight()
    sizes = {text.get_fontsize() for text in figure.findobj(Text) if text.get_text()}
    assert min(sizes) >= 7


def test_what_colour_tells_apart_shape_and_lightness_do() -> None:
    groups = drawing._GROUPS
    assert len({style["marker"] for style in groups}) == 4
    fills = sorted(1.0 if style["mfc"] == "none" else lightness(style["mfc"]) for style in groups[:3])
    assert min(np.diff(fills)) > 0.2
    # Six lines in one figure differ in marker and in stroke together.
    looks = [(style["marker"], style["ls"]) for style in drawing._LINES]
    assert len(looks) == len(set(looks)) == len({marker for marker, _ in looks})
    # Lines of a spectrum grow lighter with the layer, and all of them show on white.
    spectra = dict.fromkeys(range(30), SPECTRA[2])
    colors = [lightness(line.get_color()) for line in figures.spectrum(spectra).axes[0].lines]
    assert (np.diff(colors) > 0).all()
    assert colors[-1] < 0.8


def test_panels_wrap_and_a_spectrum_shares_its_axis() -> None:
    many = figures.tsne(collected(5), LAYERS)
    assert [axes.get_title() for axes in many.axes] == [f"layer {layer}" for layer in LAYERS]
    assert len({round(axes.get_position().y0, 3) for axes in many.axes}) == 2
    left, right, bar = figures.spectrum(SPECTRA).axes
    assert left.get_ylim() == right.get_ylim()
    assert left.get_yscale() == "log"
    assert bar.get_ylabel() == "layer"
    assert len(figures.spectrum({5: SPECTRA[5]}).axes) == 2  # one layer needs no bar
    effect = figures.effect(collected(), collected(seed=1))
    assert effect.axes[0].get_aspect() == 1  # lengths are comparable in every direction


def test_the_callers_style_and_its_open_figures_are_left_alone(tmp_path: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    figures.spectrum(SPECTRA)
    assert dict(mpl.rcParams) == before
    code = (
        "import sys, torch\nfrom sealign import figures\n"
        "figures.save_figure(figures.spectrum({2: (torch.ones(2), torch.ones(1))}), sys.argv[1])\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "figure")]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "False\n"


# --- files ---


@pytest.mark.parametrize("name", FIGURES)
def test_files_are_written_the_same_twice(name: str, tmp_path: Path) -> None:
    build, _ = FIGURES[name]
    written = [figures.save_figure(build(), tmp_path / folder / "a.figure") for folder in ("one", "two")]
    assert [path.name for path in written[0]] == ["a.figure.pdf", "a.figure.png"]
    for first, second in zip(*written, strict=True):
        assert first.read_bytes() == second.read_bytes()
    pdf, png = (path.read_bytes() for path in written[0])
    assert pdf.startswith(b"%PDF-")
    assert b"CreationDate" not in pdf
    assert b"/FontFile2" in pdf or b"/Subtype /Type0" in pdf or b"/TrueType" in pdf
    assert png.startswith(b"\x89PNG\r\n")
    assert struct.unpack(">I", png[16:20])[0] == 1050  # 3.5 inches at 300 dots


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = figures.spectrum(SPECTRA)
    save = figure.savefig

    def failing(*args: Any, **kwargs: Any) -> None:
        if kwargs["format"] == "png":
            raise MemoryError
        save(*args, **kwargs)

    monkeypatch.setattr(figure, "savefig", failing)
    with pytest.raises(MemoryError):
        figures.save_figure(figure, tmp_path / "figure")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FIGURES)
def test_points_as_csv(name: str, tmp_path: Path) -> None:
    marks = FIGURES[name][1]()
    path = figures.save_points(marks, tmp_path / "new" / name)
    assert path == tmp_path / "new" / f"{name}.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["panel", "series", "x", "y"] + (["low", "high"] if name == "score" else [])

    def number(text: str | None) -> float | None:
        return float(text) if text else None

    assert marks == [
        Mark(r["panel"], r["series"], float(r["x"]), float(r["y"]), number(r.get("low")), number(r.get("high")))
        for r in rows
    ]
    assert b"\r" not in path.read_bytes()


# --- the embedded model ---


@pytest.mark.slow
def test_the_embedded_model(smollm2: Any, tmp_path: Path) -> None:
    model, tokenizer = smollm2
    demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=12)
    config = sealign.SEAConfig(layers=(5, 20), rank=(4, 3), centered=True)
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=config)
    before = sealign.collect_activations(model, tokenizer, demonstrations, layers=(5, 20))
    with sealign.apply_edit(model, edit):
        after = sealign.collect_activations(model, tokenizer, demonstrations, layers=(5, 20))
    # At the first edited layer, what reaches the edit is what it was, so the edit can be computed alone.
    torch.testing.assert_close(after.neutral[5], edit.projections[5](before.neutral[5]), rtol=1e-3, atol=1e-4)
    marks = figures.effect_points(before, after, (5,))
    moved = places(marks, "layer 5", "edited neutral") - places(marks, "layer 5", "neutral")
    true = (after.neutral[5] - before.neutral[5]).norm(dim=1).numpy()
    assert (np.linalg.norm(moved, axis=1) <= true + 1e-6).all()  # a projection lengthens nothing
    spectra = figures.projection_spectra(edit.projections)
    for found, fresh in zip(spectra[20], figures.activation_spectra(before, centered=True)[20], strict=True):
        torch.testing.assert_close(found, fresh, rtol=1e-5, atol=0)
    built = (
        figures.tsne(before),
        figures.effect(before, after),
        figures.spectrum(spectra),
        figures.signature({"truthfulness": layer_signatures(before)}, depths={"truthfulness": 30}),
    )
    for number, figure in enumerate(built):
        assert len(figures.save_figure(figure, tmp_path / str(number))) == 2
