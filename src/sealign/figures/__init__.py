"""Figures of activations, spectra, signatures, effects of an edit and scores, and the points that they draw.

What a figure draws is a list of marks, which the function of the same name with ``_points`` returns and
``save_points`` writes.
"""

from sealign.figures.drawing import (
    effect,
    plane,
    save_figure,
    save_points,
    score_by_demonstrations,
    signature,
    spectrum,
    tsne,
)
from sealign.figures.points import (
    Mark,
    Method,
    Spectra,
    activation_spectra,
    check_method,
    effect_points,
    first_middle_last,
    projection_spectra,
    score_points,
    signature_points,
    spectrum_points,
    tsne_points,
)

__all__ = [
    "Mark",
    "Method",
    "Spectra",
    "activation_spectra",
    "check_method",
    "effect",
    "effect_points",
    "first_middle_last",
    "plane",
    "projection_spectra",
    "save_figure",
    "save_points",
    "score_by_demonstrations",
    "score_points",
    "signature",
    "signature_points",
    "spectrum",
    "spectrum_points",
    "tsne",
    "tsne_points",
]
