"""Mean-difference steering, known as CAA: the difference of the mean activations is added to every token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sealign.edits.affine_edit import AffineEdit
from sealign.edits.layer_edit import LayerEdit
from sealign.fitting.collect_config import TokenSetting
from sealign.fitting.edit_config import EditConfig
from sealign.fitting.layer_statistics import LayerStatistics
from sealign.methods.activation_fit import layerwise_method
from sealign.models.sites import Site
from sealign.spectral.projection import Normalization


class MeanDifferenceConfig(EditConfig):
    """Settings of mean-difference steering; see ``EditConfig`` and ``CollectConfig`` for the common settings.

    Attributes:
        layers: Layers to use: ``all``; ``last:L``; ``first:L``; ``signature:L`` (the L layers of highest signature); a
            fraction of the depth such as ``last:21/32``; the layer at a fraction of the depth such as ``at:13/32``; or
            indices such as ``4,5,-1``, where negative indices count from the end. Default: ``at:13/32``, which Rimsky
            et al. found best for Llama 2 7B.
        normalization: Norm of the activation that the edit preserves: ``token`` (of each token), ``feature`` (of each
            feature over the sequence) or ``none``.

    Example:
        >>> MeanDifferenceConfig(strength=2.0).site
        'residual'
    """

    site: Site = "residual"
    layers: str | Sequence[int] = "at:13/32"
    token: TokenSetting = "completion"
    normalization: Normalization = "none"


def _fit_layer(statistics: LayerStatistics, config: MeanDifferenceConfig) -> tuple[LayerEdit, Mapping[str, float]]:
    shift = (statistics.mean_positive - statistics.mean_negative).float()
    return AffineEdit.constant(shift, normalization=config.normalization), {"shift_norm": float(shift.norm())}


MEAN_DIFFERENCE = layerwise_method("mean_difference", MeanDifferenceConfig, _fit_layer)
"""x' = x + s v with v the mean over demonstrations of h+ - h- (Rimsky et al. 2024, arXiv 2312.06681, section 3).

The paper reads the token of the answer's letter; here, by default, h+ and h- are means over the tokens of a
completion. The paper adds v after the user's prompt only; here, as in the libraries that serve such vectors, it is
added at every token.
"""
