"""Settings that the methods which edit activations share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import field_validator

from sealign.fitting.collect_config import CollectConfig
from sealign.models.sites import Site, parse_layers


class EditConfig(CollectConfig):
    """Settings of a method that edits activations, together with those of the collection, see ``CollectConfig``.

    Attributes:
        site: Site in each layer: ``mlp``, ``attention`` or ``residual``.
        layers: ``all``, ``last:L``, ``first:L``, a share of the depth such as ``last:21/32``, one layer at a share of
            the depth such as ``at:13/32``, ``signature:L`` (the L layers of highest signature), or indices; negative
            indices count from the end.
        module_pattern: Path of the modules of ``site`` with ``{layer}`` in place of the index, instead of the search by
            structure.
        strength: How far the edit moves an activation: 0 is no edit, 1 the whole.

    Raises:
        SettingError: A value is unknown or out of range.
    """

    needs_rows: ClassVar[bool] = False
    """Whether the method is fitted from rows of activations, so that sums are not enough."""

    needs_pass_per_layer: ClassVar[bool] = False
    """Whether the activations of a layer depend on the edits of earlier layers, so that each layer needs its own pass
    over the demonstrations."""

    decomposes: ClassVar[bool] = False
    """Whether cross-covariances are decomposed, which takes most of the time of a fit beside the model."""

    site: Site = "mlp"
    layers: str | Sequence[int] = "last:21/32"
    module_pattern: str | None = None
    strength: float = 1.0

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, layers: Any) -> Any:
        parse_layers(layers)
        return layers

    @property
    def read_site(self) -> str:
        """The site at which activations are read; that of the edit unless the method overrides it."""
        return self.site

    @property
    def read_pattern(self) -> str | None:
        """The module pattern for reading; None if activations are read at another site than they are edited."""
        return self.module_pattern if self.read_site == self.site else None

    @property
    def chooses_by_signature(self) -> bool:
        """Whether the layers are chosen by their signature, so that all layers are collected."""
        return isinstance(self.layers, str) and self.layers.startswith("signature:")

    def statistics_settings(self) -> tuple[bool, str]:
        """Return whether the statistics of a layer are centred, and the name of their feature map."""
        return False, "identity"

    def collect_config(self) -> CollectConfig:
        """Return the settings of the collection alone."""
        return CollectConfig(**{name: getattr(self, name) for name in CollectConfig.model_fields})
