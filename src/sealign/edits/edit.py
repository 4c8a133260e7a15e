"""Edit: an edit of a model's activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from sealign.edits.affine_edit import AffineEdit
from sealign.edits.attach import RejectFeatureCall, edit_output
from sealign.edits.edit_files import build_layer_edits, read_edit_files
from sealign.edits.handle import EditHandle
from sealign.edits.intervention import Intervention
from sealign.edits.layer_edit import LayerEdit
from sealign.edits.record import EditRecord, LayerRecord
from sealign.edits.strength import check_strength
from sealign.errors import ActivationError, FingerprintError, SettingError, SiteError, check_choice
from sealign.models.sites import check_unshared
from sealign.models.structure import decoder_of, unwrap_model
from sealign.spectral.projection import NORMALIZATIONS, Normalization


@dataclass(frozen=True, eq=False, repr=False)
class Edit(Intervention):
    """An edit of a model's activations: the edit of each layer, and the record of how it was made.

    At each edited module, x' = x + strength (q y - x) for every token x; see ``LayerEdit``.

    Attributes:
        layer_edits: Edits by the index of the layer.
        record: Method, settings, layers, base model and provenance; the contents of ``edit.json``.

    Raises:
        SettingError: The record does not have the same layers.
    """

    layer_edits: Mapping[int, LayerEdit]
    record: EditRecord

    def __post_init__(self) -> None:
        named = set(self.record.layers)
        if named != {str(layer) for layer in self.layer_edits}:
            raise SettingError(
                f"layer_edits has layers {self.layers}, but the record has {sorted(named)}; they must be the same"
            )

    @property
    def layers(self) -> list[int]:
        """Indices of the edited layers, in ascending order."""
        return sorted(self.layer_edits)

    @property
    def modules(self) -> list[str]:
        """Dotted paths of the modules whose outputs are edited, by ascending layer."""
        return [self.record.layers[str(layer)].module for layer in self.layers]

    @property
    def site(self) -> str:
        """``mlp``, ``attention`` or ``residual``."""
        assert self.record.site is not None
        return self.record.site

    @property
    def strength(self) -> float:
        """Strength of the edit: 0 leaves the activation unchanged, 1 applies the fitted edit in full."""
        assert self.record.strength is not None
        return self.record.strength

    @property
    def normalization(self) -> str:
        """``token``, ``feature`` or ``none``."""
        return self.record.normalization

    @property
    def feature_map(self) -> str:
        """Name of the feature map; ``identity`` for an affine edit."""
        return self.record.feature_map

    @property
    def width(self) -> int:
        """Number of features d of the edited activations."""
        return next(iter(self.layer_edits.values())).width

    @property
    def rank(self) -> int:
        """Largest rank of a layer's edit."""
        return max(layer_edit.rank for layer_edit in self.layer_edits.values())

    @property
    def is_causal(self) -> bool:
        """Whether the edit of a token depends on that token alone; False if it is rescaled per feature."""
        return all(layer_edit.is_causal for layer_edit in self.layer_edits.values())

    @property
    def is_gated(self) -> bool:
        """Whether only some tokens are edited; see ``Gate``."""
        return any(layer_edit.gate is not None for layer_edit in self.layer_edits.values())

    @property
    def is_affine(self) -> bool:
        """Whether y is one affine function of x for all tokens, so that only the rescaling, if any, is not linear."""
        return self.feature_map == "identity" and not self.is_gated

    @property
    def affine_edits(self) -> Mapping[int, AffineEdit]:
        """The layer edits of an affine edit.

        Raises:
            SettingError: The edit has a feature map.
        """
        affine = {layer: found for layer, found in self.layer_edits.items() if isinstance(found, AffineEdit)}
        if len(affine) < len(self.layer_edits):
            raise SettingError(
                f"the edit uses the feature map '{self.feature_map}', so it is not affine; fit one with "
                "feature_map='identity'"
            )
        return affine

    def _summary(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "model": self.base_model.id,
            "site": self.record.site,
            "layers": _ranges(self.layers),
            "rank": max((layer_edit.rank for layer_edit in self.layer_edits.values()), default=0),
            "strength": self.record.strength,
            "gated": True if self.is_gated else None,
        }

    def _identity(self) -> Any:
        # Of the layers themselves rather than of the record, so that the hash shows a record that does not fit them.
        found = [self.layer_edits[layer] for layer in self.layers]
        forms = [[one.normalization, one.feature_map, getattr(one, "combine", None), _scale_of(one)] for one in found]
        return [self.record.site, self.modules, forms]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are saved: ``layers.N.left``, ``layers.N.right`` and so on."""
        return {
            f"layers.{layer}.{name}": tensor
            for layer in self.layers
            for name, tensor in self.layer_edits[layer].tensors().items()
        }

    def apply_to(
        self, activations: Mapping[int, Float[Tensor, "n d"]], *, strength: float | None = None
    ) -> dict[int, Float[Tensor, "n d"]]:
        """Return the edited activations of all layers of the edit, without running a model.

        Args:
            activations: Activations of the edited site by layer, (n, d) each; of at least the edit's layers.
            strength: Strength to use instead of the edit's own.

        Raises:
            ActivationError: A layer of the edit is missing, or has another number of features.
        """
        chosen = self.strength if strength is None else check_strength(strength)
        missing = [layer for layer in self.layers if layer not in activations]
        if missing:
            raise ActivationError(
                f"there are no activations of layers {missing}, but the edit has layers {self.layers}; collect them too"
            )
        return {layer: found(activations[layer], chosen) for layer, found in self.layer_edits.items()}

    def with_layers(self, layers: Sequence[int]) -> Edit:
        """Return the edit with some of its layers only.

        Args:
            layers: Indices of at least 1 layer of the edit.

        Raises:
            SiteError: No layer is named, or one is not part of the edit.
        """
        if not layers:
            raise SiteError(f"layers is empty, but an edit needs at least 1; the edit has layers {self.layers}")
        missing = [layer for layer in layers if layer not in self.layer_edits]
        if missing:
            raise SiteError(f"layers {missing} are not part of the edit, which has layers {self.layers}")
        kept = sorted(layers)
        record = dataclasses.replace(self.record, layers={str(layer): self.record.layers[str(layer)] for layer in kept})
        return Edit({layer: self.layer_edits[layer] for layer in kept}, record)

    def with_normalization(self, normalization: Normalization) -> Edit:
        """Return the edit with another rescaling.

        Args:
            normalization: ``token``, ``feature`` or ``none``.

        Raises:
            SettingError: The normalization is unknown.
        """
        check_choice("normalization", normalization, NORMALIZATIONS)
        changed = {
            layer: dataclasses.replace(found, normalization=normalization) for layer, found in self.layer_edits.items()
        }
        return Edit(changed, dataclasses.replace(self.record, normalization=normalization))

    def randomized(self, seed: int) -> Edit:
        """Return the edit with the directions of each layer rotated at random, as a control.

        Ranks, lengths and the angles between directions stay; see ``LayerEdit.randomized``. The directions that SEA
        keeps and those that it drops are two groups, which are rotated independently: rotated together, the two would
        cancel as much as the fitted ones do, but away from the directions in which activations vary, and the control
        would hardly change the model.

        Args:
            seed: Seed of the rotations; each layer derives its own from it.
        """
        rotated = {layer: found.randomized(seed * 100_003 + layer) for layer, found in self.layer_edits.items()}
        return Edit(rotated, self.record)

    def reversed(self) -> Edit:
        """Return the edit in the opposite direction, as a control; see ``LayerEdit.reversed``."""
        opposite = {layer: found.reversed() for layer, found in self.layer_edits.items()}
        layers = {
            name: layer_record(entry.module, opposite[int(name)], entry.relative_change, entry.statistics)
            for name, entry in self.record.layers.items()
        }
        return Edit(opposite, dataclasses.replace(self.record, layers=layers))

    def install(self, model: Any, handle: EditHandle) -> None:
        """Register a forward hook on each edited module; see ``attach``.

        Raises:
            FingerprintError: The model lacks a module of the edit.
            SiteError: A module of the edit is part of several layers of the model.
        """
        base = unwrap_model(model)
        if not self.is_causal:
            # Both are entry points: some models call their inner decoder past the outer one.
            for entry in (base, decoder_of(model)):
                handle.add_hook(entry, RejectFeatureCall(handle), before=True, with_kwargs=True)
        modules = {layer: self._module(base, layer) for layer in self.layers}
        check_unshared(base, modules)
        for layer, module in modules.items():
            edit_output(module, self.layer_edits[layer], handle)

    def _module(self, base: Any, layer: int) -> nn.Module:
        path = self.record.layers[str(layer)].module
        try:
            found: nn.Module = base.get_submodule(path)
        except AttributeError:
            raise FingerprintError(
                f"{type(base).__name__} has no module '{path}', which the edit needs; load '{self.base_model.id}'"
            ) from None
        return found

    @classmethod
    def from_pretrained(cls, folder_or_repo_id: str | Path, *, revision: str | None = None) -> Edit:
        """Load an edit from a local folder or a repository of the Hugging Face Hub, and check all of it.

        Args:
            folder_or_repo_id: A folder, or ``owner/name``.
            revision: Branch, tag or commit of the repository.

        Raises:
            EditFileError: A file is missing, truncated, corrupted or of a newer format, has unknown keys, or has
                tensors that do not fit the record; or the folder holds a method that does not edit activations.
        """
        record, tensors = read_edit_files(folder_or_repo_id, revision=revision)
        return cls.from_record(record, tensors, place=str(folder_or_repo_id))

    @classmethod
    def from_record(cls, record: EditRecord, tensors: Mapping[str, Tensor], *, place: str = "edit") -> Edit:
        """Build an edit from its record and its tensors, and check that they fit each other.

        Args:
            record: Contents of ``edit.json``.
            tensors: Contents of ``edit.safetensors``.
            place: Name of the folder, for messages.

        Raises:
            EditFileError: A setting is unknown, or a tensor is missing, unexpected, of the wrong shape or not finite.
        """
        return cls(build_layer_edits(record, tensors, place=place), record)


def _ranges(layers: Sequence[int]) -> str:
    """Return ascending layers as text, with runs of neighbours abridged: ``3, 9-29``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _scale_of(layer_edit: LayerEdit) -> float:
    return layer_edit.scale if isinstance(layer_edit, AffineEdit) else 0.0


def layer_record(
    module: str, layer_edit: LayerEdit, relative_change: float, statistics: Mapping[str, float]
) -> LayerRecord:
    """Return the record of one layer.

    Args:
        module: Dotted path of the edited module.
        layer_edit: Edit of the layer.
        relative_change: Mean of |x' - x| / |x| over the neutral activations.
        statistics: Further figures of the method.
    """
    return LayerRecord(
        module=module,
        rank=layer_edit.rank,
        groups=layer_edit.groups,
        scale=_scale_of(layer_edit),
        relative_change=relative_change,
        statistics=dict(statistics),
    )
