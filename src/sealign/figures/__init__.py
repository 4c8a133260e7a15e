"""Figures of activations, spectra, signatures, effects of an edit, strengths and scores, and the points that they draw.

The data of a figure are a list of points, which the function of the same name with ``_points`` returns and
``save_points`` writes.
"""

from sealign.figures.drawing import effect, plane, score_by_demonstrations, signature, spectrum, tsne
from sealign.figures.embedding import Embedding, check_embedding, effect_points, first_middle_last, tsne_points
from sealign.figures.points import (
    Point,
    Spectra,
    activation_signatures,
    activation_spectra,
    save_points,
    score_points,
    signature_points,
    spectrum_points,
)
from sealign.figures.style import save_figure
from sealign.figures.sweep import sweep, sweep_points, sweeps

__all__ = [
    "Embedding",
    "Point",
    "Spectra",
    "activation_signatures",
    "activation_spectra",
    "check_embedding",
    "effect",
    "effect_points",
    "first_middle_last",
    "plane",
    "save_figure",
    "save_points",
    "score_by_demonstrations",
    "score_points",
    "signature",
    "signature_points",
    "spectrum",
    "spectrum_points",
    "sweep",
    "sweep_points",
    "sweeps",
    "tsne",
    "tsne_points",
]
