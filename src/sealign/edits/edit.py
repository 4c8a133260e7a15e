"""Edit: an edit of a model's activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sealign.edits.handle import EditHandle
from sealign.edits.intervention import Intervention, read_edit_files
from sealign.edits.layer_edit import AffineEdit, FeatureMapEdit, LayerEdit
from sealign.edits.record import EditRecord, LayerRecord
from sealign.edits.strength import check_strength
from sealign.errors import EditFileError, FingerprintError, NormalizationError, SettingError, SiteError, unknown_name
from sealign.models.sites import SITES
from sealign.models.structure import decoder_of, unwrap_model
from sealign.spectral.feature_maps import get_feature_map
from sealign.spectral.projection import COMBINES, NORMALIZATIONS, Normalization, Projection


@dataclass(frozen=True, eq=False)
class Edit(Intervention):
    """An edit of a model's activations: the edit of each layer, and the record of how it was made.

    At each edited module, x' = x + strength (q y - x) for every token x; see ``LayerEdit``.

    Attributes:
        layer_edits: By layer index.
        record: Method, settings, layers, base model and provenance; the contents of ``edit.json``.
    """

    layer_edits: Mapping[int, LayerEdit]
    record: EditRecord

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
        """How far the edit moves an activation: 0 is no edit, 1 the whole."""
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
    def is_affine(self) -> bool:
        """Whether y is an affine function of x, so that only the rescaling, if any, is not linear."""
        return self.feature_map == "identity"

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

    def _identity(self) -> Any:
        record = self.record
        scales = [record.layers[str(layer)].scale for layer in self.layers]
        return [record.site, record.normalization, record.feature_map, record.combine, self.modules, scales]

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
        """Return edited activations, by layer.

        Args:
            activations: By layer, of the edited site.
            strength: In place of the edit's own.
        """
        chosen = self.strength if strength is None else check_strength(strength)
        return {layer: found(activations[layer], chosen) for layer, found in self.layer_edits.items()}

    def with_layers(self, layers: Sequence[int]) -> Edit:
        """Return the edit of some of its layers only.

        Args:
            layers: Indices of at least one layer of the edit.

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
        _check_choice("normalization", normalization, NORMALIZATIONS)
        changed = {
            layer: dataclasses.replace(found, normalization=normalization) for layer, found in self.layer_edits.items()
        }
        return Edit(changed, dataclasses.replace(self.record, normalization=normalization))

    def randomized(self, seed: int) -> Edit:
        """Return the edit with the directions of each layer rotated at random, as a control.

        Ranks, lengths, singular values and the angles between directions stay; see ``LayerEdit.randomized``.

        Args:
            seed: Seed of the rotations; each layer derives its own from it.
        """
        rotated = {layer: found.randomized(seed * 100_003 + layer) for layer, found in self.layer_edits.items()}
        return Edit(rotated, self.record)

    def reversed(self) -> Edit:
        """Return the edit in the opposite direction, as a control; see ``LayerEdit.reversed``."""
        opposite = {layer: found.reversed() for layer, found in self.layer_edits.items()}
        layers = {
            name: dataclasses.replace(entry, scale=_scale_of(opposite[int(name)]))
            for name, entry in self.record.layers.items()
        }
        return Edit(opposite, dataclasses.replace(self.record, layers=layers))

    def install(self, model: Any, handle: EditHandle) -> None:
        """Register a forward hook on each edited module; see ``attach``.

        Raises:
            FingerprintError: The model lacks a module of the edit.
        """
        base = unwrap_model(model)
        if not self.is_causal:
            # Both are entry points: some models call their inner decoder past the outer one.
            for entry in (base, decoder_of(model)):
                hook = entry.register_forward_pre_hook(_check_feature_call(handle), with_kwargs=True)
                handle.stack.callback(hook.remove)
        for layer in self.layers:
            path = self.record.layers[str(layer)].module
            try:
                module = base.get_submodule(path)
            except AttributeError:
                raise FingerprintError(
                    f"{type(base).__name__} has no module '{path}', which the edit needs; load '{self.base_model.id}'"
                ) from None
            edit_output(module, self.layer_edits[layer], handle)

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
        try:
            _check_record(record)
        except SettingError as error:
            raise EditFileError(f"'{place}': {error}") from error
        kind = _affine_edit if record.feature_map == "identity" else _feature_map_edit
        layer_edits: dict[int, LayerEdit] = {}
        unread = set(tensors)
        for layer, entry in record.layers.items():
            prefix = f"layers.{layer}."
            own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            unread -= {prefix + name for name in own}
            try:
                layer_edits[int(layer)] = kind(own, entry, record)
            except ValueError as error:
                raise EditFileError(f"'{place}': layer {layer}: {error}; copy or download the edit again") from error
        if unread:
            raise EditFileError(
                f"'{place}': tensor {min(unread)} is not in the record; copy or download the edit again"
            )
        return cls(layer_edits, record)


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
    return LayerRecord(module, layer_edit.rank, _scale_of(layer_edit), relative_change, dict(statistics))


def edit_output(module: nn.Module, layer_edit: LayerEdit, handle: EditHandle) -> None:
    """Register a forward hook that edits a module's output while a handle is active.

    Args:
        module: The module; its output is a tensor, or a tuple whose first element is edited.
        layer_edit: What is applied to each token.
        handle: Handle that the hook obeys, and that removes it.
    """
    parameter = next(module.parameters(), None)
    if parameter is not None and parameter.device.type != "meta" and parameter.is_floating_point():
        layer_edit.prepare(parameter.device, parameter.dtype)  # so that neither a first call nor a graph has to
    handle.stack.callback(module.register_forward_hook(_EditHook(layer_edit, handle)).remove)


class _EditHook:
    """The forward hook of one edited module."""

    def __init__(self, layer_edit: LayerEdit, handle: EditHandle) -> None:
        self._layer_edit = layer_edit
        self._handle = handle

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        handle = self._handle
        if not handle.active:
            return None
        strength: Any = handle.strength
        if isinstance(output, tuple):
            return (self._layer_edit(output[0], strength), *output[1:])
        return self._layer_edit(output, strength)


def _check_feature_call(handle: EditHandle) -> Any:
    """Return a pre-hook that refuses the calls for which per-feature rescaling is not defined."""

    def check(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not handle.active:
            return
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            raise NormalizationError(
                "per-feature rescaling depends on all tokens of a sequence, so it is not defined in cached decoding; "
                "pass use_cache=False, or use normalization='token'"
            )
        if tokens is not None and tokens.shape[0] > 1:
            raise NormalizationError(
                f"per-feature rescaling is not defined for a batch of {tokens.shape[0]}, whose padding would count; "
                "run one sequence at a time, or use normalization='token'"
            )

    return check


def _check_choice(kind: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise SettingError(unknown_name(kind, value, known))


def _check_record(record: EditRecord) -> None:
    """Raise SettingError if a setting of an edit of activations is unknown or out of range."""
    if record.site is None or record.strength is None or not record.layers:
        raise SettingError(f"'{record.method}' does not edit activations; load it with sealign.load_edit")
    _check_choice("site", record.site, SITES)
    _check_choice("normalization", record.normalization, NORMALIZATIONS)
    get_feature_map(record.feature_map)
    if record.feature_map != "identity":
        _check_choice("combination", record.combine or "", COMBINES)
    check_strength(record.strength)
    bad = [layer for layer in record.layers if not layer.isdecimal() or str(int(layer)) != layer]
    if bad:
        raise SettingError(f"layer {bad[0]!r} is not a whole number")


def _affine_edit(tensors: Mapping[str, Tensor], entry: LayerRecord, record: EditRecord) -> AffineEdit:
    _check_tensors(tensors, required=("left", "right"), optional=("shift", "center"))
    width = tensors["left"].shape[0] if tensors["left"].dim() else 0
    shapes = {"left": (width, entry.rank), "right": (entry.rank, width), "shift": (width,), "center": (width,)}
    _check_shapes(tensors, shapes)
    return AffineEdit(
        tensors["left"],
        tensors["right"],
        entry.scale,
        tensors.get("shift"),
        tensors.get("center"),
        normalization=record.normalization,  # type: ignore[arg-type]
    )


def _feature_map_edit(tensors: Mapping[str, Tensor], entry: LayerRecord, record: EditRecord) -> FeatureMapEdit:
    _check_tensors(tensors, required=("positive", "negative"), optional=("mean",))
    positive, negative = tensors["positive"], tensors["negative"]
    width = positive.shape[0] if positive.dim() else 0
    kept = positive.shape[1] if positive.dim() == 2 else 0
    _check_shapes(tensors, {"positive": (width, kept), "negative": (width, entry.rank - kept), "mean": (width,)})
    projection = Projection(positive, negative, tensors.get("mean"), record.feature_map)
    return FeatureMapEdit(projection, record.combine, normalization=record.normalization)  # type: ignore[arg-type]


def _check_tensors(tensors: Mapping[str, Tensor], *, required: Sequence[str], optional: Sequence[str]) -> None:
    missing = sorted(set(required) - set(tensors))
    extra = sorted(set(tensors) - {*required, *optional})
    if missing or extra:
        raise ValueError(f"missing tensors: {missing or 'none'}, tensors not in the record: {extra or 'none'}")


def _check_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"tensor {name} has shape {tuple(tensor.shape)}, but must have {shapes[name]}")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"tensor {name} holds NaN, infinity or no floating-point numbers")
