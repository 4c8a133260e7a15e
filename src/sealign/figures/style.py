"""The style of all figures, and how they are saved.

Figures are legible in grey: shape, line style and lightness distinguish what colour does.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sealign.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN_WIDTH = 3.5
"""Width of a figure for one column of a paper, in inches."""

PAGE_WIDTH = 6.4
"""Width of a figure for a whole page, in inches."""

# Colours of Okabe and Ito (2008), which people with any colour vision can distinguish.
BLUE, ORANGE, RED, GREEN, PINK = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7"

_SETTINGS: Any = {
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
    "svg.fonttype": "path",
    "svg.hashsalt": "sealign",  # so that the same figure gives the same text
}


@contextmanager
def figure_style() -> Iterator[Any]:
    """Apply the style inside a ``with`` block, and yield matplotlib.

    Both drawing and saving need it, since matplotlib creates ticks when it saves.
    """
    import matplotlib as mpl
    import matplotlib.cm
    import matplotlib.colors
    import matplotlib.ticker

    with mpl.rc_context(_SETTINGS):
        yield mpl


def save_figure(figure: Figure, path_without_suffix: str | Path) -> list[Path]:
    """Write a figure as PDF and as PNG with 300 dots per inch; the same figure gives the same bytes.

    Both are rendered before one is written, and each is written atomically.

    Args:
        figure: The figure.
        path_without_suffix: Path of the files without ``.pdf`` and ``.png``; their folder is created and
            existing files are replaced.

    Returns:
        Paths of the two files.

    Raises:
        OSError: The folder cannot be created or written to.
    """
    rendered = {
        "pdf": _render(figure, "pdf", metadata={"CreationDate": None}),
        "png": _render(figure, "png", dpi=300),
    }
    paths = [Path(f"{path_without_suffix}.{suffix}") for suffix in rendered]
    for path, data in zip(paths, rendered.values(), strict=True):
        write_bytes(path, data)
    return paths


def svg_text(figure: Figure) -> str:
    """Return a figure as SVG; the same figure gives the same text."""
    return _render(figure, "svg", metadata={"Date": None}).decode()


def _render(figure: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with figure_style():
        figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()
