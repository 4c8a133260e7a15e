"""Figures for one column of a paper, drawn from marks and written as PDF, PNG and CSV.

Each is 3.5 inches wide and can be read in grey: shape, line and lightness tell apart what colour does.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sealign.errors import SettingError
from sealign.figures.points import (
    Mark,
    Method,
    Spectra,
    effect_points,
    score_points,
    signature_points,
    spectrum_points,
    tsne_points,
)
from sealign.files import write_bytes
from sealign.fitting.activations import Activations

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH = 3.5
"""Inches."""

# Colours of Okabe and Ito (2008), which the colour-blind tell apart.
_BLUE, _ORANGE, _RED, _GREEN, _PINK = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7"

_GROUPS = [
    {"marker": marker, "mfc": fill, "mec": edge, "ls": "none", "ms": size, "mew": 0.6}
    for marker, fill, edge, size in (
        ("o", _BLUE, _BLUE, 3.5),
        ("^", _ORANGE, "black", 3.5),
        ("s", "none", "black", 4.5),
        ("D", _PINK, "black", 2.5),
    )
]
"""Of positives, negatives, neutrals and edited neutrals, which leave their neutral in sight where they lie on it."""

_LINES = [
    {"color": color, "ls": line, "marker": marker, "ms": 3, "lw": 1}
    for color, line, marker in zip(
        ("black", _RED, _BLUE, _ORANGE, _GREEN, _PINK), ("-", "--", "-.", ":", "-", "--"), "o^sDvX", strict=True
    )
]

_STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "figure.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,  # publishers refuse the default
}


def tsne(activations: Activations, layers: Sequence[int] | None = None, *, seed: int = 0) -> Figure:
    """Return the figure of ``tsne_points``: positives and negatives, a panel for each layer."""
    return plane(tsne_points(activations, layers, seed=seed), "tsne")


def effect(
    before: Activations,
    after: Activations,
    layers: Sequence[int] | None = None,
    *,
    method: Method = "pca",
    seed: int = 0,
) -> Figure:
    """Return the figure of ``effect_points``: what an edit does to neutral activations, a panel for each layer."""
    return plane(effect_points(before, after, layers, method=method, seed=seed), method)


def plane(marks: Sequence[Mark], method: Method) -> Figure:
    """Return the figure of points that ``tsne_points`` or ``effect_points`` has laid in planes by a method."""
    name = {"tsne": "t-SNE {} (arbitrary units)", "pca": "component {} (activation units)"}[method]
    # Panels with figures on their axes need more room.
    columns = min(3 if method == "tsne" else 2, len({mark.panel for mark in marks}))
    height = {1: 3.1, 2: 2.4}.get(columns, 1.7)
    with _style():
        figure = _draw(marks, _GROUPS, (name.format(1), name.format(2)), height=height, columns=columns)
        for axes in figure.axes:
            if method == "tsne":
                axes.set(xticks=[], yticks=[])  # they would mean nothing
            else:
                axes.set_aspect("equal", "datalim")
    return figure


def spectrum(spectra: Spectra) -> Figure:
    """Return the figure of ``spectrum_points``: singular values on a log axis, a line for each layer.

    Raises:
        SettingError: no layers, or a singular value that is not above 0.
    """
    import numpy as np

    marks = spectrum_points(spectra)
    layers = sorted(spectra) or [0]
    several = len(layers) > 1
    with _style() as mpl:
        # Lightness rises with the layer; the lightest part of the map is too faint on white.
        shades = mpl.colors.ListedColormap(mpl.colormaps["cividis"](np.linspace(0, 0.85, 256)))
        scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(layers[0] - 0.5, layers[-1] + 0.5), shades)
        styles = [{"color": scale.to_rgba(layer), "marker": ".", "ms": 2, "lw": 0.8} for layer in layers]
        labels = ("index of the singular value", "singular value (squared activation units)")
        figure = _draw(marks, styles, labels, height=2.6, columns=2, log=True, legend=not several)
        for axes in figure.axes:
            axes.set_xlim(left=0.4)
            axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4, integer=True))
        if several:
            ticks = mpl.ticker.MaxNLocator(6, integer=True, min_n_ticks=1)
            figure.colorbar(scale, ax=figure.axes, label="layer", ticks=ticks)
    return figure


def signature(signatures: Mapping[str, Mapping[int, float]], *, depths: Mapping[str, int] | None = None) -> Figure:
    """Return the figure of ``signature_points`` on a log axis: a line for each model or behaviour.

    Raises:
        SettingError: as ``signature_points``, or a signature that is not above 0.
    """
    marks = signature_points(signatures, depths=depths)
    labels = ("share of the model's layers", "signature (activation units)")
    with _style():
        return _draw(marks, _LINES, labels, height=2.6, log=True)


def score_by_demonstrations(
    counts: Sequence[int], scores: Sequence[Sequence[float]], *, base: float, metric: str = "score"
) -> Figure:
    """Return the figure of ``score_points``: mean, range over runs, and the base model as a dashed line.

    Args:
        counts, scores, base: as for ``score_points``.
        metric: what the score is, with its unit, for the axis.
    """
    marks = score_points(counts, scores, base=base)
    styles = [{"color": _BLUE, "marker": "o", "ms": 3.5}, {"color": "black", "ls": "--", "lw": 1}]
    with _style() as mpl:
        figure = _draw(marks, styles, ("demonstrations", metric), height=2.6)
        figure.axes[0].set_xscale("log")
        axis = figure.axes[0].xaxis
        axis.set_major_locator(mpl.ticker.FixedLocator(sorted(counts)))
        axis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:.0f}"))
        axis.set_minor_locator(mpl.ticker.NullLocator())
    return figure


@contextmanager
def _style() -> Iterator[Any]:
    """Our style, and matplotlib itself; what is drawn and what is saved needs it, since ticks are made on saving."""
    import matplotlib as mpl
    import matplotlib.cm
    import matplotlib.colors
    import matplotlib.ticker

    with mpl.rc_context(_STYLE):
        yield mpl


def _draw(
    marks: Sequence[Mark],
    styles: Sequence[Mapping[str, Any]],
    labels: tuple[str, str],
    *,
    height: float,
    columns: int = 1,
    log: bool = False,
    legend: bool = True,
) -> Figure:
    """Draw the marks of each series in one of the styles, in turn; ``height`` is of a row of panels, in inches."""
    from matplotlib.figure import Figure

    panels = _by_panel(marks, log)
    names = list(dict.fromkeys(mark.series for mark in marks))
    look = dict(zip(names, itertools.cycle(styles), strict=False))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(_WIDTH, height * rows))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=log).flatten()
    for axes, (panel, lines) in zip(grid, panels.items(), strict=False):
        for name, own in lines.items():
            axes.plot([mark.x for mark in own], [mark.y for mark in own], label=name, **look[name])
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


def _by_panel(marks: Sequence[Mark], log: bool) -> dict[str, dict[str, list[Mark]]]:
    """Return panel -> series -> marks, in the order in which they come."""
    if not marks:
        raise SettingError("there is nothing to draw; give at least one series")
    panels: dict[str, dict[str, list[Mark]]] = {}
    for mark in marks:
        if not math.isfinite(mark.y) or (log and mark.y <= 0):
            bound = "finite and above 0, on a log axis" if log else "finite"
            raise SettingError(f"'{mark.series}' is {mark.y} at {mark.x:g}, but it must be {bound}; leave it out")
        panels.setdefault(mark.panel, {}).setdefault(mark.series, []).append(mark)
    return panels


# --- files ---


def save_figure(figure: Figure, path_without_suffix: str | Path) -> list[Path]:
    """Write a figure as PDF and PNG, 300 dots an inch; the same figure gives the same bytes.

    Both are drawn before either is written, and each is written whole or not at all.

    Raises:
        OSError: the folder cannot be made or written to.

    Returns:
        The two files.
    """
    drawn: dict[str, bytes] = {}
    with _style():
        for suffix, options in (("pdf", {"metadata": {"CreationDate": None}}), ("png", {"dpi": 300})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, **options)
            drawn[suffix] = buffer.getvalue()
    return [_write(path_without_suffix, suffix, data) for suffix, data in drawn.items()]


def save_points(marks: Sequence[Mark], path_without_suffix: str | Path) -> Path:
    """Write marks as CSV with a header, low and high only where any mark has them, whole or not at all.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    names = [field.name for field in dataclasses.fields(Mark)]
    used = [name for name in names if any(getattr(mark, name) is not None for mark in marks)]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([used, *([getattr(mark, name) for name in used] for mark in marks)])
    return _write(path_without_suffix, "csv", buffer.getvalue().encode())


def _write(path_without_suffix: str | Path, suffix: str, data: bytes) -> Path:
    path = Path(f"{path_without_suffix}.{suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data)
    return path
