"""Settings of a fit, and what its choice of layers means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from sealign.edits.edit import check_settings
from sealign.edits.record import EditSettings
from sealign.errors import SettingError, SiteError, unknown_name
from sealign.fitting.collect_config import CollectConfig
from sealign.models.prompt_format import PromptFormat
from sealign.models.sites import SITES, Site, _parse_layers
from sealign.spectral.projection import Combine, Normalization

Pair = tuple[float, float]
"""A value for the positives and one for the negatives."""


@dataclass(frozen=True, kw_only=True)
class FitConfig(CollectConfig):
    """Settings of a fit; with those of the collection of activations, see ``CollectConfig``.

    Attributes:
        explained_variance: K in (0, 1], or a pair (positive, negative).
        rank: k in [1, d], or a pair (positive, negative), in place of ``explained_variance``.
        centered: subtract each matrix's own mean, and edit about the neutral mean; the paper does not.
        feature_map: ``identity`` (linear), ``squared_exponential``, ``tanh`` or ``elu``.
        site: where the edit acts: ``mlp``, ``attention`` or ``residual``.
        fit_site: where activations are read; the same as ``site`` if None.
        layers: ``all``, ``last:L``, ``first:L``, a share of the depth such as ``last:21/32``, ``signature:L``
            (the L of highest signature), or indices; negative ones count from the end.
        module_pattern: modules of ``site`` by path with ``{layer}``, in place of the search by structure.
        combine: ``both``, ``positive``, ``negative``, ``average`` or ``reversed``.
        normalization: ``token``, ``feature`` or ``none``.
        strength: how far the edit goes; 0 is no edit, 1 the whole.
        seed: of the random token and of iterative decompositions.

    Raises:
        SettingError: a value is unknown, out of range, or contradicts another; SiteError for a site.

    Example:
        >>> FitConfig(explained_variance=0.9, centered=True, strength=0.25).layers
        'last:21/32'
    """

    explained_variance: float | Pair = 0.998
    rank: int | tuple[int, int] | None = None
    centered: bool = False
    feature_map: str = "identity"
    site: Site = "mlp"
    fit_site: Site | None = None
    layers: str | Sequence[int] = "last:21/32"
    module_pattern: str | None = None
    combine: Combine = "both"
    normalization: Normalization = "token"
    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for site in (self.site, self.fit_site or self.site):
            if site not in SITES:
                raise SiteError(unknown_name("site", site, SITES))
        for name in ("explained_variance", "rank"):
            if len(self.targets(name)) != 2:
                raise SettingError(
                    f"{name} is {getattr(self, name)}, but it must be one value or a pair (positive, negative)"
                )
        for share in self.targets("explained_variance"):
            if not 0 < share <= 1:
                raise SettingError(f"explained_variance is {share}, but it must be in (0, 1]; try 0.9 or 0.998")
        for rank in self.targets("rank"):
            if rank is not None and rank < 1:
                raise SettingError(f"rank is {rank}, but it must be at least 1 and at most the model's width")
        check_settings(self.settings())
        if not isinstance(self.layers, str):
            object.__setattr__(self, "layers", tuple(self.layers))
        _parse_layers(self.layers)

    def targets(self, name: str) -> tuple[Any, Any]:
        """Return ``explained_variance`` or ``rank`` as a pair (positive, negative)."""
        value = getattr(self, name)
        return tuple(value) if isinstance(value, tuple | list) else (value, value)

    def settings(self) -> EditSettings:
        """Return the settings that the edit is applied with."""
        return EditSettings(
            self.site, self.combine, self.normalization, float(self.strength), self.feature_map, self.centered
        )

    def collect_config(self) -> CollectConfig:
        """Return the settings that activations are collected with."""
        return CollectConfig(**{field.name: getattr(self, field.name) for field in fields(CollectConfig)})

    @classmethod
    def reference(cls) -> FitConfig:
        """Return the configuration of the paper's released code (yfqiu-nlp/sea-llm), for comparison.

        Fitted on the residual stream with generated neutrals, applied to the MLP outputs of the last 21 of 32
        layers (in proportion for other depths), K = 0.998, rescaled per feature. Known faults: the edit is applied
        at another site than it is fitted on; per-feature rescaling makes a token's edit depend on later tokens
        and is refused here for batches and cached decoding, where the released code fails or flips
        signs; K of an uncentred covariance is mostly spent on the mean. The released code reads the last
        layer's residual after the final norm, Sealign before it.

        Example:
            >>> FitConfig.reference().normalization
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
