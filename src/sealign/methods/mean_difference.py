"""Mean-difference steering, known as CAA: the difference of the mean activations is added to every token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sealign.edits.edit import Edit
from sealign.edits.layer_edit import AffineEdit, LayerEdit
from sealign.fitting.activations import Activations
from sealign.fitting.edit_config import EditConfig
from sealign.fitting.layer_statistics import LayerStatistics
from sealign.methods.activation_fit import build_edit, collected_rows, fit_collected, fit_layers
from sealign.methods.method import FitContext, Method
from sealign.models.sites import Site
from sealign.spectral.projection import Normalization


class MeanDifferenceConfig(EditConfig):
    """Settings of mean-difference steering; see ``EditConfig`` and ``CollectConfig`` for those not listed.

    Attributes:
        site: Where the edit acts. Default: the residual stream.
        layers: Layers that are steered. Default: one layer at 13/32 of the depth, which Rimsky et al. found best for
            Llama 2 7B.
        normalization: How the edited activation is rescaled: ``token``, ``feature`` or ``none``.

    Example:
        >>> MeanDifferenceConfig(strength=2.0).site
        'residual'
    """

    site: Site = "residual"
    layers: str | Sequence[int] = "at:13/32"
    normalization: Normalization = "none"


def _fit_layer(statistics: LayerStatistics, config: MeanDifferenceConfig) -> tuple[LayerEdit, Mapping[str, float]]:
    shift = (statistics.mean_positive - statistics.mean_negative).float()
    return AffineEdit.constant(shift, normalization=config.normalization), {"shift_norm": float(shift.norm())}


def _fit(context: FitContext, config: MeanDifferenceConfig) -> Edit:
    return build_edit(context, MEAN_DIFFERENCE.name, config, fit_layers(context, config, _fit_layer))


def _fit_activations(context: FitContext, activations: Activations, config: MeanDifferenceConfig) -> Edit:
    fits = fit_collected(context, config, collected_rows(config, activations), _fit_layer)
    return build_edit(context, MEAN_DIFFERENCE.name, config, fits)


MEAN_DIFFERENCE = Method("mean_difference", MeanDifferenceConfig, Edit, _fit, _fit_activations)
"""x' = x + s v with v the mean over demonstrations of h+ - h- (Rimsky et al. 2024, arXiv 2312.06681, section 3).

The paper adds v after the user's prompt only; here, as in the libraries that serve such vectors, it is added at every
token.
"""
