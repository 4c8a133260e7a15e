"""Activations, spectra, signatures and scores for the tests of figures, and a figure of each kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sealign import figures
from sealign.figures import Point
from sealign.fitting.activations import Activations

LAYERS = (0, 3, 4, 9)
WIDTH = 11


def collected(count: int = 7, *, layers: tuple[int, ...] = LAYERS, shift: float = 3.0, seed: int = 0) -> Activations:
    """Activations of several layers; positives and negatives lie apart by twice the shift."""
    generator = torch.Generator().manual_seed(seed)

    def block(offset: float) -> dict[int, torch.Tensor]:
        direction = torch.ones(WIDTH) * offset
        return {layer: torch.randn(count, WIDTH, generator=generator) + direction * (layer + 1) for layer in layers}

    return Activations("mlp", block(0.5), block(shift), block(-shift))


def places(points: list[Point], panel: str, *series: str) -> np.ndarray:
    """The (x, y) of some series of a panel."""
    return np.array([(m.x, m.y) for m in points if m.panel.startswith(panel) and (not series or m.series in series)])


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

FIGURES: dict[str, tuple[Callable[[], Any], Callable[[], list[Point]]]] = {
    "tsne": (lambda: figures.tsne(collected()), lambda: figures.tsne_points(collected())),
    "effect": (
        lambda: figures.effect(collected(), collected(seed=1), (0, 3, 9)),
        lambda: figures.effect_points(collected(), collected(seed=1), (0, 3, 9)),
    ),
    "effect-tsne": (
        lambda: figures.effect(collected(), collected(seed=1), embedding="tsne"),
        lambda: figures.effect_points(collected(), collected(seed=1), embedding="tsne"),
    ),
    "spectrum": (lambda: figures.spectrum(SPECTRA), lambda: figures.spectrum_points(SPECTRA)),
    "one-layer": (lambda: figures.spectrum({5: SPECTRA[5]}), lambda: figures.spectrum_points({5: SPECTRA[5]})),
    "signature": (lambda: figures.signature(SIGNATURES), lambda: figures.signature_points(SIGNATURES)),
    "score": (
        lambda: figures.score_by_demonstrations(*SCORES, base=0.375, metric="accuracy"),
        lambda: figures.score_points(*SCORES, base=0.375),
    ),
}
