"""Figures of activations, spectra, signatures and scores for one column of a paper, drawn from points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sealign.errors import SettingError
from sealign.figures.embedding import Embedding, effect_points, tsne_points
from sealign.figures.points import Point, Spectra, score_points, signature_points, spectrum_points
from sealign.figures.style import BLUE, COLUMN_WIDTH, GREEN, ORANGE, PINK, RED, figure_style
from sealign.fitting.activations import Activations

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GROUPS = [
    {"marker": marker, "mfc": fill, "mec": edge, "ls": "none", "ms": size, "mew": 0.6}
    for marker, fill, edge, size in (
        ("o", BLUE, BLUE, 3.5),
        ("^", ORANGE, "black", 3.5),
        ("s", "none", "black", 4.5),
        ("D", PINK, "black", 2.5),
    )
]
"""Styles of positives, negatives, neutrals and edited neutrals; the last do not hide the neutrals under them."""

_LINES = [
    {"color": color, "ls": line, "marker": marker, "ms": 3, "lw": 1}
    for color, line, marker in zip(
        ("black", RED, BLUE, ORANGE, GREEN, PINK), ("-", "--", "-.", ":", "-", "--"), "o^sDvX", strict=True
    )
]
"""Styles of the lines of one figure."""


def tsne(activations: Activations, layers: Sequence[int] | None = None, *, seed: int = 0) -> Figure:
    """Return the figure of ``tsne_points``: positives and negatives, with one panel per layer.

    Args:
        activations, layers, seed: As for ``tsne_points``.
    """
    return plane(tsne_points(activations, layers, seed=seed), "tsne")


def effect(
    before: Activations,
    after: Activations,
    layers: Sequence[int] | None = None,
    *,
    embedding: Embedding = "pca",
    seed: int = 0,
) -> Figure:
    """Return the figure of ``effect_points``: the effect of an edit on neutral activations, with one panel per layer.

    Args:
        before, after, layers, embedding, seed: As for ``effect_points``.
    """
    return plane(effect_points(before, after, layers, embedding=embedding, seed=seed), embedding)


def plane(points: Sequence[Point], embedding: Embedding) -> Figure:
    """Return the figure of points in planes, as returned by ``tsne_points`` or ``effect_points``.

    Args:
        points: Points to draw; must not be empty.
        embedding: The embedding that gave the points.
    """
    name = {"tsne": "t-SNE {} (arbitrary units)", "pca": "component {} (activation units)"}[embedding]
    # Panels with numbers on their axes need more room.
    columns = min(3 if embedding == "tsne" else 2, len({point.panel for point in points}))
    height = {1: 3.1, 2: 2.4}.get(columns, 1.7)
    with figure_style():
        figure = _draw(points, _GROUPS, (name.format(1), name.format(2)), height=height, columns=columns)
        for axes in figure.axes:
            if embedding == "tsne":
                axes.set(xticks=[], yticks=[])  # they would have no meaning
            else:
                axes.set_aspect("equal", "datalim")
    return figure


def spectrum(spectra: Spectra) -> Figure:
    """Return the figure of ``spectrum_points``: singular values on a logarithmic axis, with one line per layer.

    Args:
        spectra: Singular values by layer.

    Raises:
        SettingError: There are no layers, or a singular value is not above 0.
    """
    import numpy as np

    points = spectrum_points(spectra)
    layers = sorted(spectra) or [0]
    several = len(layers) > 1
    with figure_style() as mpl:
        # Lightness increases with the layer; the lightest part of the map is too faint on white.
        shades = mpl.colors.ListedColormap(mpl.colormaps["cividis"](np.linspace(0, 0.85, 256)))
        scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(layers[0] - 0.5, layers[-1] + 0.5), shades)
        styles = [{"color": scale.to_rgba(layer), "marker": ".", "ms": 2, "lw": 0.8} for layer in layers]
        labels = ("index of the singular value", "singular value (squared activation units)")
        figure = _draw(points, styles, labels, height=2.6, columns=2, log=True, legend=not several)
        for axes in figure.axes:
            axes.set_xlim(left=0.4)
            axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4, integer=True))
        if several:
            ticks = mpl.ticker.MaxNLocator(6, integer=True, min_n_ticks=1)
            figure.colorbar(scale, ax=figure.axes, label="layer", ticks=ticks)
    return figure


def signature(signatures: Mapping[str, Mapping[int, float]], *, depths: Mapping[str, int] | None = None) -> Figure:
    """Return the figure of ``signature_points`` on a logarithmic axis, with one line per model or behaviour.

    Args:
        signatures, depths: As for ``signature_points``.

    Raises:
        SettingError: As for ``signature_points``, or a signature is not above 0.
    """
    points = signature_points(signatures, depths=depths)
    labels = ("depth (fraction of the layers)", "signature (activation units)")
    with figure_style():
        return _draw(points, _LINES, labels, height=2.6, log=True)


def score_by_demonstrations(
    counts: Sequence[int], scores: Sequence[Sequence[float]], *, base: float, metric: str = "score"
) -> Figure:
    """Return the figure of ``score_points``: the mean and range over runs, and the base model as a dashed line.

    Args:
        counts, scores, base: As for ``score_points``.
        metric: Name of the score with its unit, for the axis.
    """
    points = score_points(counts, scores, base=base)
    styles = [{"color": BLUE, "marker": "o", "ms": 3.5}, {"color": "black", "ls": "--", "lw": 1}]
    with figure_style() as mpl:
        figure = _draw(points, styles, ("demonstrations", metric), height=2.6)
        figure.axes[0].set_xscale("log")
        axis = figure.axes[0].xaxis
        axis.set_major_locator(mpl.ticker.FixedLocator(sorted(counts)))
        axis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:.0f}"))
        axis.set_minor_locator(mpl.ticker.NullLocator())
    return figure


def _draw(
    points: Sequence[Point],
    styles: Sequence[Mapping[str, Any]],
    labels: tuple[str, str],
    *,
    height: float,
    columns: int = 1,
    log: bool = False,
    legend: bool = True,
) -> Figure:
    """Draw each series in one of the styles, in turn; ``height`` is the height of a row of panels in inches."""
    from matplotlib.figure import Figure

    panels = _by_panel(points, log)
    names = list(dict.fromkeys(point.series for point in points))
    look = dict(zip(names, itertools.cycle(styles), strict=False))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(COLUMN_WIDTH, height * rows))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=log).flatten()
    for axes, (panel, lines) in zip(grid, panels.items(), strict=False):
        for name, own in lines.items():
            axes.plot([point.x for point in own], [point.y for point in own], label=name, **look[name])
            if own[0].low is not None:
                axes.fill_between([m.x for m in own], [m.low for m in own], [m.high for m in own], color="0.85", lw=0)
        axes.set(title=panel.replace(": ", "\n"), yscale="log" if log else "linear")
    for axes in grid[len(panels) :]:
        axes.remove()
    figure.supxlabel(labels[0])
    figure.supylabel(labels[1])
    if legend:
        fits = sum(len(name) + 6 for name in names) <= 60
        in_a_row = len(names) if fits else 2 if max(map(len, names)) <= 24 else 1
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=in_a_row)
    return figure


def _by_panel(points: Sequence[Point], log: bool) -> dict[str, dict[str, list[Point]]]:
    """Return the points by panel and series, in their order."""
    if not points:
        raise SettingError("there is nothing to draw; give at least one series")
    panels: dict[str, dict[str, list[Point]]] = {}
    for point in points:
        if not math.isfinite(point.y) or (log and point.y <= 0):
            bound = "finite and above 0 for a logarithmic axis" if log else "finite"
            raise SettingError(f"'{point.series}' is {point.y} at {point.x:g}, but it must be {bound}; leave it out")
        panels.setdefault(point.panel, {}).setdefault(point.series, []).append(point)
    return panels
