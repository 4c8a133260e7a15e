"""SEA, spectral editing of activations: keep what covaries with positives, drop what covaries with negatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from sealign.edits.affine_edit import AffineEdit
from sealign.edits.feature_map_edit import FeatureMapEdit
from sealign.edits.layer_edit import LayerEdit
from sealign.errors import ActivationError, DegenerateError, SettingError
from sealign.fitting.edit_config import EditConfig
from sealign.fitting.layer_statistics import LayerStatistics
from sealign.methods.activation_fit import layerwise_method
from sealign.methods.cancellation import cancellation
from sealign.models.prompt_format import PromptFormat
from sealign.models.sites import Site
from sealign.spectral.decomposition import Spectrum, leading_spectrum
from sealign.spectral.feature_maps import FeatureMapName
from sealign.spectral.projection import Combine, Normalization, Projection

COMBINATION_WEIGHTS = {
    "both": (0.0, 1.0, -1.0),
    "positive": (-1.0, 1.0, 0.0),
    "negative": (0.0, 0.0, -1.0),
    "average": (-0.5, 0.5, -0.5),
    "reversed": (0.0, -1.0, 1.0),
}
"""Linear edits as y = x + a z + b U+ U+^T z + c U- U-^T z with z = x - mu: (a, b, c) by combination."""

Fraction = Annotated[float, Field(gt=0, le=1)]
Rank = Annotated[int, Field(ge=1)]

EXPLAINED_VARIANCE = 0.998
"""Default K; the paper's value for TruthfulQA."""


class SEAConfig(EditConfig):
    """Settings of SEA; see ``EditConfig`` and ``CollectConfig`` for the common settings.

    Attributes:
        explained_variance: Fraction of the sum of squared singular values that the selected directions must explain, in
            (0, 1], or a pair (positive, negative). Default: 0.998, unless ``rank`` is given.
        rank: Number of directions, in [1, d], or a pair (positive, negative), instead of ``explained_variance``.
        centered: Whether to subtract the mean from each activation matrix, and to apply the edit relative to the mean
            of the neutral activations. The paper does not centre.
        feature_map: Map applied to activations before the decomposition: ``identity`` (linear edit),
            ``squared_exponential``, ``tanh`` or ``elu``.
        fit_site: Site at which activations are read. Default: the same as ``site``.
        combine: Which projections form the edit: ``both``, ``positive``, ``negative``, ``average`` or ``reversed``.
        shift: Whether to add the difference of the means of positives and negatives, which the projections alone cannot
            move. Needs ``feature_map="identity"``.
        normalization: Norm of the activation that the edit preserves: ``token`` (of each token), ``feature`` (of each
            feature over the sequence) or ``none``.
        seed: Seed of the random token and of iterative decompositions.

    Raises:
        SettingError: A value is unknown, out of range, or contradicts another.

    Example:
        >>> SEAConfig(explained_variance=0.9, centered=True, strength=0.25).layers
        'last:21/32'
    """

    decomposes: ClassVar[bool] = True
    max_strength: ClassVar[float] = 1.0

    explained_variance: Annotated[Fraction | tuple[Fraction, Fraction] | None, Field(examples=[0.9, 0.998])] = None
    rank: Rank | tuple[Rank, Rank] | None = None
    centered: bool = False
    feature_map: FeatureMapName = "identity"
    fit_site: Site | None = None
    combine: Annotated[Combine, Field(title="combination")] = "both"
    shift: bool = False
    normalization: Normalization = "token"

    @model_validator(mode="after")
    def _check_shift(self) -> SEAConfig:
        if self.shift and self.feature_map != "identity":
            raise SettingError(
                f"shift is True and feature_map is '{self.feature_map}', but a shift can only be added to a linear "
                "edit; use feature_map='identity'"
            )
        return self

    @model_validator(mode="after")
    def _check_target(self) -> SEAConfig:
        if self.rank is not None and self.explained_variance is not None:
            raise SettingError(
                f"rank is {self.rank} and explained_variance is {self.explained_variance}, but only one of them can "
                "decide the number of directions; leave out the other"
            )
        return self

    @property
    def read_site(self) -> str:
        """Site at which activations are read."""
        return self.fit_site or self.site

    def statistics_settings(self) -> tuple[bool, str]:
        """Return whether the cross-covariances are centred, and the name of their feature map."""
        return self.centered, self.feature_map

    @property
    def largest_rank(self) -> int:
        """Larger one of both ranks; 0 if the explained variance decides them."""
        return max(self.rank) if isinstance(self.rank, tuple) else self.rank or 0

    def targets(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the arguments of ``leading_spectrum`` that decide k, for the positives and for the negatives."""
        name = "explained_variance" if self.rank is None else "rank"
        value = (self.explained_variance or EXPLAINED_VARIANCE) if self.rank is None else self.rank
        plus, minus = value if isinstance(value, tuple) else (value, value)
        return {name: plus}, {name: minus}

    @classmethod
    def reference(cls) -> SEAConfig:
        """Return the configuration of the paper's released code (yfqiu-nlp/sea-llm), for comparison.

        Fitted on the residual stream with generated neutrals, applied to the MLP outputs of the last 21 of 32
        layers (in proportion for other depths), K = 0.998, rescaled per feature. Known faults: the edit is applied
        at another site than it is fitted on; per-feature rescaling makes a token's edit depend on later tokens
        and is refused here for batches and cached decoding, where the released code fails or flips
        signs; K of an uncentred covariance is mostly spent on the mean. The released code reads the last
        layer's residual after the final norm, Sealign before it.

        Example:
            >>> SEAConfig.reference().normalization
            'feature'
        """
        return cls(
            explained_variance=0.998,
            site="mlp",
            fit_site="residual",
            layers="last:21/32",
            normalization="feature",
            neutral="generated",
            max_new_tokens=256,
            prompt_format=PromptFormat("few_shot_chat"),
        )


def fit_projection(
    neutral: Float[Tensor, "n d"],
    positive: Float[Tensor, "n d"],
    negative: Float[Tensor, "n d"],
    *,
    explained_variance: float | tuple[float, float] | None = None,
    rank: int | tuple[int, int] | None = None,
    centered: bool = False,
    feature_map: FeatureMapName = "identity",
    seed: int = 0,
) -> Projection:
    """Fit the projection of one layer from three matrices of activations.

    Omega+ = Phi(H)^T Phi(H+) / n and Omega- = Phi(H)^T Phi(H-) / n. U+ and U- are the fewest leading left singular
    vectors that explain a fraction K of the sum of squared singular values (Qiu et al. 2024, arXiv 2405.09719,
    section 3).

    Args:
        neutral, positive, negative: H, H+ and H-, (n, d) each; row i is demonstration i. n must be at least 2.
        explained_variance: K in (0, 1], or a pair (positive, negative). Default: 0.998, unless ``rank`` is given.
        rank: k in [1, d], or a pair, instead of ``explained_variance``.
        centered: Whether to subtract each matrix's own mean, after the feature map.
        feature_map: Name of Phi.
        seed: Seed of iterative decompositions.

    Returns:
        A projection whose factors have the type and device of ``neutral``, at least float32.

    Raises:
        ActivationError: Shapes differ, there are fewer than 2 rows, or an entry is NaN or infinite.
        DegenerateError: A cross-covariance is zero or has a lower rank than requested.
        SettingError: A setting is out of range.

    Example:
        >>> h = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        >>> fit_projection(h, h + 1, h - 1, rank=(2, 1)).rank_positive
        2
    """
    config = SEAConfig(
        explained_variance=explained_variance, rank=rank, centered=centered, feature_map=feature_map, seed=seed
    )
    if neutral.dim() == 2 and neutral.shape[0] < 2:
        raise ActivationError(f"there are {neutral.shape[0]} demonstrations, but a fit needs at least 2")
    statistics = LayerStatistics(neutral.shape[-1], centered=centered, feature_map=feature_map)
    statistics.update(neutral, positive, negative)
    return decompose(statistics, config)[0]


def decompose(statistics: LayerStatistics, config: SEAConfig) -> tuple[Projection, Spectrum, Spectrum]:
    """Return the projection of one layer, and the spectra of Omega+ and Omega- that it is made of.

    Args:
        statistics: Statistics of the layer over all demonstrations.
        config: Settings of the fit.

    Raises:
        DegenerateError: A cross-covariance is zero or has a lower rank than requested.
    """
    spectra = []
    neutral = None  # left factor of both sides, whose Gram matrix is computed once
    sides = (("positive", statistics.positive), ("negative", statistics.negative))
    for (side, covariance), target in zip(sides, config.targets(), strict=True):
        omega = covariance.compute(left=neutral)
        neutral = omega.left
        try:
            spectra.append(leading_spectrum(omega, **target, seed=config.seed))
        except DegenerateError as error:
            raise DegenerateError(f"neutral and {side} activations: {error}") from error
    dtype = torch.promote_types(statistics.neutral_sample.dtype, torch.float32)
    plus, minus = spectra
    projection = Projection(
        # Row-major, as they are read back from a file, so that a loaded edit computes the same to the bit.
        plus.vectors.to(dtype).contiguous(),
        minus.vectors.to(dtype).contiguous(),
        statistics.mean.to(dtype) if config.centered else None,
        config.feature_map,
    )
    return projection, plus, minus


def projection_edit(
    projection: Projection,
    *,
    combine: Combine = "both",
    difference: Float[Tensor, " d"] | None = None,
    normalization: Normalization = "token",
) -> LayerEdit:
    """Return a projection as the edit of a layer: affine, or in feature space if it has a feature map.

    With z = x - mu and (a, b, c) the weights of the combination,
    y = x + a z + b U+ U+^T z + c U- U-^T z + (b - c) / 2 delta: keeping towards the positives and dropping from the
    negatives each move the mean by half of the difference delta.

    Args:
        projection: U+ and U-.
        combine: Which projections form y.
        difference: delta, the mean of the positives minus that of the negatives, (d,); None to leave the mean where it
            is. Must be None if the projection has a feature map.
        normalization: How to rescale y; see ``LayerEdit``.

    Raises:
        SettingError: There are a difference and a feature map.

    Example:
        >>> e = torch.eye(3)
        >>> edit = projection_edit(Projection(e[:, :1], e[:, 1:2]), normalization="none")
        >>> edit(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[2., 0., 3.]])
    """
    if projection.feature_map != "identity":
        if difference is not None:
            raise SettingError(
                f"difference is given with the feature map '{projection.feature_map}', but a shift can only be added "
                "to a linear edit; use feature_map='identity'"
            )
        return FeatureMapEdit(projection, combine, normalization=normalization)
    scale, keep, drop = COMBINATION_WEIGHTS[combine]
    used = [(weight, f) for weight, f in ((keep, projection.positive), (drop, projection.negative)) if weight]
    return AffineEdit(
        torch.cat([weight * factor for weight, factor in used], dim=1),
        torch.cat([factor.T for _, factor in used]),
        scale,
        None if difference is None else (keep - drop) / 2 * difference,
        center=projection.mean,
        groups=tuple(factor.shape[1] for _, factor in used),
        normalization=normalization,
    )


def _fit_layer(statistics: LayerStatistics, config: SEAConfig) -> tuple[LayerEdit, Mapping[str, float]]:
    projection, plus, minus = decompose(statistics, config)
    figures = {
        "explained_variance_positive": plus.explained_variance,
        "explained_variance_negative": minus.explained_variance,
    }
    if 0 not in COMBINATION_WEIGHTS[config.combine][1:]:
        figures |= cancellation(projection, statistics.neutral_sample)
    difference = None
    if config.shift:
        difference = (statistics.mean_positive - statistics.mean_negative).to(projection.positive)
    edit = projection_edit(
        projection, combine=config.combine, difference=difference, normalization=config.normalization
    )
    return edit, figures


SEA = layerwise_method("sea", SEAConfig, _fit_layer)
"""Spectral editing of activations (Qiu et al. 2024, arXiv 2405.09719)."""
