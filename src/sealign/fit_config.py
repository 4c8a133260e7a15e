"""Settings of a fit, and what its choice of layers means."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

from sealign.collect_config import CollectConfig
from sealign.edit import check_settings
from sealign.errors import SettingError, SiteError, unknown_name
from sealign.projection import Combine, Normalization
from sealign.prompts import PromptFormat
from sealign.record import EditSettings
from sealign.sites import SITES, Site

Pair = tuple[float, float]
"""A value for the positives and one for the negatives."""


def _parse_layers(layers: str | Sequence[int]) -> tuple[str, Fraction] | list[int] | None:
    """Return (kind, count or share), indices, or None for all.

    Raises:
        SettingError: not one of the forms.
    """
    if not isinstance(layers, str):
        if not layers:
            raise SettingError("layers is empty; name at least one layer, or 'all'")
        return list(layers)
    if layers == "all":
        return None
    match = re.fullmatch(r"(last|first|signature):(\d+(?:/\d+)?)", layers)
    if match:
        try:
            share = Fraction(match[2])
        except ZeroDivisionError:
            share = Fraction(0)
        if share > 0:
            return match[1], share if "/" in match[2] else Fraction(int(match[2]))
    elif re.fullmatch(r"-?\d+(,-?\d+)*", layers):
        return [int(part) for part in layers.split(",")]
    raise SettingError(
        f"layers is '{layers}', but it must be all, last:L, first:L, signature:L with L at least 1, a share of the "
        "depth such as last:21/32, or indices such as 4,5,-1"
    )


def select_layers(layers: str | Sequence[int], depth: int, signatures: Mapping[int, float] | None = None) -> list[int]:
    """Return the indices that a choice of layers means in a model of some depth, rising.

    Args:
        layers: see ``FitConfig.layers``.
        depth: number of decoder layers.
        signatures: by layer, for ``signature:L``.

    Raises:
        SettingError: not one of the forms.
        SiteError: more layers than the model has, or an index outside it.

    Example:
        >>> select_layers("last:21/32", 30)[0], select_layers([-1, 2], 30)
        (10, [2, 29])
    """
    parsed = _parse_layers(layers)
    if parsed is None:
        return list(range(depth))
    if isinstance(parsed, list):
        outside = [layer for layer in parsed if not -depth <= layer < depth]
        if outside:
            raise SiteError(f"layer {outside[0]} is outside the model, which has layers 0 to {depth - 1}")
        return sorted({layer % depth for layer in parsed})
    kind, amount = parsed
    share = isinstance(layers, str) and "/" in layers
    count = max(1, round(amount * depth)) if share else int(amount)
    if count > depth:
        raise SiteError(f"layers '{layers}' asks for {count} layers, but the model has {depth}")
    if kind == "signature":
        assert signatures is not None
        return sorted(sorted(signatures, key=lambda layer: -signatures[layer])[:count])
    return list(range(depth - count, depth)) if kind == "last" else list(range(count))


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
