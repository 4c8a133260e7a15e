"""Settings common to all methods that edit activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from sealign.edits.layer_edit import check_gate_normalization
from sealign.edits.strength import check_strength
from sealign.errors import DegenerateError, SettingError
from sealign.fitting.collect_config import CollectConfig
from sealign.models.sites import Site, parse_layers


class EditConfig(CollectConfig):
    """Settings of a method that edits activations, including the collection settings of ``CollectConfig``.

    Attributes:
        site: Site of the edit in each layer: ``mlp``, ``attention`` or ``residual``.
        layers: Layers to use: ``all``; ``last:L``; ``first:L``; ``signature:L`` (the L layers of highest signature); a
            fraction of the depth such as ``last:21/32``; the layer at a fraction of the depth such as ``at:13/32``; or
            indices such as ``4,5,-1``, where negative indices count from the end.
        module_pattern: Dotted path of the modules of the site, with ``{layer}`` as placeholder for the layer index,
            such as ``model.layers.{layer}.mlp``. Default: found by structure.
        layer_weights: Factors of the change at each layer, in ascending order of the layers, such as ``0.5,1``; not for
            edits that are rescaled. Default: 1 at each layer.
        strength: Strength of the edit, in [-1000, 1000]: 0 leaves the activation unchanged, 1 applies the fitted edit
            in full; negative values and values above 1 are allowed.
        gate: Share of the tokens of ordinary text that the edit may act on, such as ``0.1``: a probe then selects the
            tokens that resemble those of the demonstrations. Such an edit runs in Python and in vLLM, and cannot be
            exported. Default: no gate, so that all tokens are edited.

    Raises:
        SettingError: A value is unknown or out of range.
    """

    needs_rows: ClassVar[bool] = False
    """Whether the method needs the rows of activations, so that it cannot be fitted from their sums."""

    needs_pass_per_layer: ClassVar[bool] = False
    """Whether each layer is fitted on activations that the edits of earlier layers have changed, so that each layer
    needs its own pass over the demonstrations."""

    decomposes: ClassVar[bool] = False
    """Whether the fit decomposes cross-covariances, which takes most of its time apart from running the model."""

    max_strength: ClassVar[float] = math.inf
    """Largest strength that is worth choosing: 1 for a projection, which is complete then."""

    site: Site = "mlp"
    layers: str | Sequence[int] = "last:21/32"
    module_pattern: str | None = None
    layer_weights: str | Sequence[float] | None = None
    strength: float = 1.0
    gate: Annotated[float, Field(gt=0, lt=1, examples=[0.1])] | None = None

    @field_validator("layer_weights", mode="before")
    @classmethod
    def _parse_weights(cls, weights: Any) -> Any:
        if not isinstance(weights, str):
            return weights
        try:
            return tuple(float(part) for part in weights.split(","))
        except ValueError:
            raise SettingError(f"layer_weights is '{weights}', but it must be numbers such as 0.5,1") from None

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, layers: Any) -> Any:
        parse_layers(layers)
        return layers

    @field_validator("strength")
    @classmethod
    def _check_strength(cls, strength: float) -> float:
        return check_strength(strength)

    @model_validator(mode="after")
    def _check_gate(self) -> Self:
        check_gate_normalization(self.gate is not None, getattr(self, "normalization", "none"))
        return self

    @property
    def read_site(self) -> str:
        """Site at which activations are read: the site of the edit, unless a method overrides it."""
        return self.site

    @property
    def read_pattern(self) -> str | None:
        """Module pattern for reading; None if activations are read at another site than they are edited."""
        return self.module_pattern if self.read_site == self.site else None

    @property
    def chooses_by_signature(self) -> bool:
        """Whether the layers are chosen by their signature, so that all layers are collected."""
        return isinstance(self.layers, str) and self.layers.startswith("signature:")

    def statistics_settings(self) -> tuple[bool, str]:
        """Return whether the statistics of a layer are centred, and the name of their feature map."""
        return False, "identity"

    @property
    def largest_rank(self) -> int:
        """Largest number of directions that a fit must find in a layer; 0 if the data decides it."""
        return 0

    def check_available(self, demonstrations: int, layers: int, model: Any) -> None:
        """Raise an error if a fit with these settings is bound to fail, before the model is run.

        Args:
            demonstrations: Number of demonstrations.
            layers: Number of layers that are chosen.
            model: Configuration of the model's text decoder.

        Raises:
            SettingError: The rank exceeds the width of the activations.
            DegenerateError: The rank exceeds that of any cross-covariance of so few demonstrations.
            SiteError: The layers have less than a setting asks for.
        """
        if self.layer_weights is not None and len(self.layer_weights) != layers:
            raise SettingError(
                f"layer_weights has {len(self.layer_weights)} numbers, but {layers} layers are chosen; give one each"
            )
        rank, width = self.largest_rank, model.hidden_size
        if rank > width:
            raise SettingError(
                f"rank is {rank}, but it must be in [1, {width}], where {width} is the width of the activations"
            )
        centered = self.statistics_settings()[0]
        if rank > demonstrations - centered:
            raise DegenerateError(
                f"rank is {rank}, but {demonstrations} {'centred ' if centered else ''}demonstrations have at most "
                f"{demonstrations - centered} directions; lower the rank or add demonstrations"
            )

    def collect_config(self) -> CollectConfig:
        """Return the settings of the collection alone."""
        return CollectConfig(**{name: getattr(self, name) for name in CollectConfig.model_fields})
