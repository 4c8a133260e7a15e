"""Settings that the methods which edit activations share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import field_validator

from sealign.fitting.collect_config import CollectConfig
from sealign.models.sites import Site, parse_layers


class EditConfig(CollectConfig):
    """Settings of a method that edits activations, together with those of the collection, see ``CollectConfig``.

    Attributes:
        site: Where the edit acts: ``mlp``, ``attention`` or ``residual``.
        layers: ``all``, ``last:L``, ``first:L``, a share of the depth such as ``last:21/32``, one layer at a share of
            the depth such as ``at:13/32``, ``signature:L`` (the L layers of highest signature), or indices; negative
            indices count from the end.
        module_pattern: Path of the modules of ``site`` with ``{layer}`` in place of the index, instead of the search by
            structure.
        strength: How far the edit moves an activation: 0 is no edit, 1 the whole.

    Raises:
        SettingError: A value is unknown or out of range.
    """

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
        """The site at which activations are read; that of the edit unless the method says otherwise."""
        return self.site

    @property
    def chooses_by_signature(self) -> bool:
        """Whether the layers are chosen by their signature, so that all layers are collected."""
        return isinstance(self.layers, str) and self.layers.startswith("signature:")

    def statistics_settings(self) -> tuple[bool, str]:
        """Return whether the statistics of a layer are centred, and the name of the feature map they are taken in."""
        return False, "identity"

    def collect_config(self) -> CollectConfig:
        """Return the settings of the collection alone."""
        return CollectConfig(**{name: getattr(self, name) for name in CollectConfig.model_fields})
