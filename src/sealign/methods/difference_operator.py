"""The difference operator: the leading part of what positives and negatives covary with differently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field

from sealign.edits.affine_edit import AffineEdit
from sealign.edits.layer_edit import LayerEdit
from sealign.fitting.collect_config import TokenSetting
from sealign.fitting.edit_config import EditConfig
from sealign.fitting.layer_statistics import LayerStatistics
from sealign.methods.activation_fit import layerwise_method
from sealign.models.sites import Site
from sealign.spectral.decomposition import leading_spectrum
from sealign.spectral.projection import Normalization


class DifferenceOperatorConfig(EditConfig):
    """Settings of the difference operator; see ``EditConfig`` and ``CollectConfig`` for the common settings.

    Attributes:
        rank: Number of singular directions k, in [1, d].
        normalization: Norm of the activation that the edit preserves: ``token`` (of each token), ``feature`` (of each
            feature over the sequence) or ``none``.

    Example:
        >>> DifferenceOperatorConfig(strength=0.2).rank
        1
    """

    rank: Annotated[int, Field(ge=1)] = 1
    site: Site = "residual"
    layers: str | Sequence[int] = "at:15/32"
    token: TokenSetting = "completion"
    normalization: Normalization = "none"

    @property
    def largest_rank(self) -> int:
        """The rank."""
        return self.rank


def _fit_layer(statistics: LayerStatistics, config: DifferenceOperatorConfig) -> tuple[LayerEdit, Mapping[str, float]]:
    omega = statistics.positive.difference(statistics.negative)
    spectrum = leading_spectrum(omega, rank=config.rank, seed=config.seed)
    values = spectrum.values[: config.rank]
    # Omega^T U_k = V_k S_k, so that V_k needs no decomposition of its own.
    left = omega.transpose_multiply(spectrum.vectors) / values[0]
    dtype = torch.promote_types(statistics.neutral_sample.dtype, torch.float32)
    figures = {"singular_value": float(values[0]), "explained_variance": spectrum.explained_variance}
    edit = AffineEdit(
        left.to(dtype).contiguous(),
        spectrum.vectors.T.to(dtype).contiguous(),
        normalization=config.normalization,
    )
    return edit, figures


DIFFERENCE_OPERATOR = layerwise_method("difference_operator", DifferenceOperatorConfig, _fit_layer)
"""x' = x + s V_k (S_k / S_1) U_k^T x with Omega+ - Omega- = H^T (H+ - H-) / n = U S V^T.

What positives and negatives share cancels before the decomposition, which the two separate decompositions of SEA do not
allow, and both sides of the decomposition are used: U_k reads the activation, V_k is written. The edit has no constant
part, so on the output of a matrix it is exactly a LoRA of rank k. PRISM-Delta (arXiv 2603.10705) decomposes the same
difference for attention keys.
"""
