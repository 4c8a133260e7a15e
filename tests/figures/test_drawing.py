"""Figures draw their points, and are legible in grey."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sealign
from sealign import figures
from sealign.figures import drawing
from sealign.figures.style import figure_style
from tests.figure_data import FIGURES, LAYERS, SCORES, SPECTRA, collected, drawn, lightness, places


def test_importing_is_light() -> None:
    code = (
        "import sys, sealign.figures; print([n for n in ('matplotlib', 'sklearn', 'transformers') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


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
    with figure_style():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        box = figure.get_tightbbox(canvas.get_renderer())  # in inches
    assert min(box.x0, box.y0) >= 0
    assert box.x1 <= figure.get_figwidth()
    assert box.y1 <= figure.get_figheight()
    sizes = {text.get_fontsize() for text in figure.findobj(Text) if text.get_text()}
    assert min(sizes) >= 7


def test_shape_and_lightness_distinguish_what_colour_does() -> None:
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


def test_the_band_is_the_range() -> None:
    figure = figures.score_by_demonstrations(*SCORES, base=0.375)
    (band,) = figure.axes[0].collections
    corners = {(float(x), float(y)) for x, y in np.asarray(band.get_paths()[0].vertices)}
    assert {(100, 0.25), (100, 0.75), (50, 0.375), (50, 0.5), (25, 0.25)} == corners


@pytest.mark.slow
def test_the_embedded_model(smollm2: Any, tmp_path: Path) -> None:
    model, tokenizer = smollm2
    demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=12)
    config = sealign.SEAConfig(layers=(5, 20), rank=(4, 3), centered=True)
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=config)
    before = sealign.collect_activations(model, tokenizer, demonstrations, layers=(5, 20))
    with sealign.apply_edit(model, edit):
        after = sealign.collect_activations(model, tokenizer, demonstrations, layers=(5, 20))
    # The input of the first edited layer is unchanged, so its output can be edited outside the model.
    torch.testing.assert_close(after.neutral[5], edit.apply_to(before.neutral)[5], rtol=1e-3, atol=1e-4)
    points = figures.effect_points(before, after, (5,))
    moved = places(points, "layer 5", "edited neutral") - places(points, "layer 5", "neutral")
    true = (after.neutral[5] - before.neutral[5]).norm(dim=1).numpy()
    assert (np.linalg.norm(moved, axis=1) <= true + 1e-6).all()  # the plane shows projections
    built = (
        figures.tsne(before),
        figures.effect(before, after),
        figures.spectrum(figures.activation_spectra(before, centered=True)),
        figures.signature({"truthfulness": figures.activation_signatures(before)}, depths={"truthfulness": 30}),
    )
    for number, figure in enumerate(built):
        assert len(figures.save_figure(figure, tmp_path / str(number))) == 2
