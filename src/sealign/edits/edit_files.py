"""Reading the files of an edit, and checking that the record and the tensors belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sealign.edits.affine_edit import AffineEdit
from sealign.edits.feature_map_edit import FeatureMapEdit
from sealign.edits.gate import PROBE, THRESHOLD, Gate
from sealign.edits.layer_edit import LayerEdit
from sealign.edits.record import FORMAT, FORMAT_VERSION, RECORD_NAME, TENSORS_NAME, EditRecord, LayerRecord
from sealign.edits.strength import MAX_STRENGTH, check_strength
from sealign.errors import EditFileError, SettingError, check_choice
from sealign.files import locate_folder, read_tensors, tensors_hash
from sealign.models.sites import SITES
from sealign.record_files import read_record
from sealign.spectral.feature_maps import get_feature_map
from sealign.spectral.projection import COMBINES, NORMALIZATIONS, Projection

GATE = (PROBE, THRESHOLD)
"""Names of the tensors of a gate, which a layer has both of or none."""

_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_edit_files(
    folder_or_repo_id: str | Path, *, revision: str | None = None
) -> tuple[EditRecord, dict[str, Tensor]]:
    """Read the record and the tensors of a saved edit, and check that they belong together.

    Args:
        folder_or_repo_id: Folder, or repository of the Hub as ``owner/name``.
        revision: Branch, tag or commit of the repository.

    Returns:
        The record, and the tensors by name.

    Raises:
        EditFileError: A file is missing, truncated, corrupted, of another format, or was changed.
    """
    folder = locate_folder(folder_or_repo_id, revision=revision)
    file = folder / RECORD_NAME
    if not file.is_file():
        raise EditFileError(f"'{folder}' has no {RECORD_NAME}, so it is not an edit; check the path")
    record = read_record(file, EditRecord, format=FORMAT, format_version=FORMAT_VERSION)
    tensors = read_tensors(folder / TENSORS_NAME)
    if tensors_hash(tensors) != record.tensors_hash:
        raise EditFileError(
            f"the tensors of '{folder}' do not match their hash in {RECORD_NAME}; copy or download the edit again"
        )
    return record, tensors


def build_layer_edits(record: EditRecord, tensors: Mapping[str, Tensor], *, place: str) -> dict[int, LayerEdit]:
    """Return the edit of each layer of a record, and check that the tensors fit it.

    Args:
        record: Contents of ``edit.json``.
        tensors: Contents of ``edit.safetensors``.
        place: Name of the folder, for messages.

    Returns:
        The edits by layer, in ascending order.

    Raises:
        EditFileError: A setting is unknown, or a tensor is missing, unexpected, of the wrong shape or not finite; or
            the method does not edit activations.
    """
    try:
        _check_record(record)
    except SettingError as error:
        raise EditFileError(f"'{place}': {error}") from error
    names = {layer: f"layers.{layer}." for layer in record.layers}
    unread = [name for name in tensors if not name.startswith(tuple(names.values()))]
    if unread:
        raise EditFileError(f"'{place}': tensor {min(unread)} is not in the record; copy or download the edit again")
    build = _affine_edit if record.feature_map == "identity" else _feature_map_edit
    layer_edits: dict[int, LayerEdit] = {}
    for layer in sorted(record.layers, key=int):
        prefix = names[layer]
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        try:
            layer_edits[int(layer)] = build(own, record.layers[layer], record)
        except ValueError as error:
            raise EditFileError(f"'{place}': layer {layer}: {error}; copy or download the edit again") from error
    return layer_edits


def _check_record(record: EditRecord) -> None:
    """Raise SettingError if a setting of an edit of activations is unknown or out of range."""
    if record.site is None:
        raise SettingError(f"'{record.method}' does not edit activations; load it with sealign.load_edit")
    if record.strength is None or not record.layers:
        missing = "strength" if record.strength is None else "layers"
        raise SettingError(f"'{record.method}' edits activations, but has no {missing}; fit the edit again")
    check_choice("site", record.site, SITES)
    check_choice("normalization", record.normalization, NORMALIZATIONS)
    get_feature_map(record.feature_map)
    if record.feature_map != "identity":
        check_choice("combination", record.combine or "", COMBINES)
    check_strength(record.strength)
    bad = [layer for layer in record.layers if not layer.isdecimal() or str(int(layer)) != layer]
    if bad:
        raise SettingError(f"layer {bad[0]!r} is not a whole number; copy or download the edit again")


def _affine_edit(tensors: Mapping[str, Tensor], entry: LayerRecord, record: EditRecord) -> AffineEdit:
    _check_tensors(tensors, required=("left", "right"), optional=("shift", "center", *GATE))
    if abs(entry.scale) > MAX_STRENGTH:
        raise ValueError(f"scale is {entry.scale:g}, but it must be in [-{MAX_STRENGTH:g}, {MAX_STRENGTH:g}]")
    width = tensors["left"].shape[0] if tensors["left"].dim() else 0
    shapes = {"left": (width, entry.rank), "right": (entry.rank, width), "shift": (width,), "center": (width,)}
    shapes |= _gate_shapes(width)
    _check_shapes(tensors, shapes)
    return AffineEdit(
        tensors["left"],
        tensors["right"],
        entry.scale,
        tensors.get("shift"),
        tensors.get("center"),
        groups=entry.groups,
        normalization=record.normalization,  # type: ignore[arg-type]
        gate=Gate.of(tensors),
    )


def _feature_map_edit(tensors: Mapping[str, Tensor], entry: LayerRecord, record: EditRecord) -> FeatureMapEdit:
    _check_tensors(tensors, required=("positive", "negative"), optional=("mean", *GATE))
    positive, negative = tensors["positive"], tensors["negative"]
    width = positive.shape[0] if positive.dim() else 0
    if len(entry.groups) != 2 or sum(entry.groups) != entry.rank:
        raise ValueError(f"groups is {entry.groups}, but it must be two numbers whose sum is the rank, {entry.rank}")
    kept, dropped = entry.groups
    _check_shapes(
        tensors, {"positive": (width, kept), "negative": (width, dropped), "mean": (width,)} | _gate_shapes(width)
    )
    projection = Projection(positive, negative, tensors.get("mean"), record.feature_map)
    return FeatureMapEdit(
        projection,
        record.combine,  # type: ignore[arg-type]
        normalization=record.normalization,  # type: ignore[arg-type]
        gate=Gate.of(tensors),
    )


def _gate_shapes(width: int) -> dict[str, tuple[int, ...]]:
    return {PROBE: (width,), THRESHOLD: ()}


def _check_tensors(tensors: Mapping[str, Tensor], *, required: Sequence[str], optional: Sequence[str]) -> None:
    required = [*required, *(GATE if set(GATE) & set(tensors) else ())]
    missing = sorted(set(required) - set(tensors))
    extra = sorted(set(tensors) - {*required, *optional})
    if missing or extra:
        raise ValueError(f"missing tensors: {missing or 'none'}, unknown tensors: {extra or 'none'}")


def _check_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if (tensor := tensors.get(name)) is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"tensor {name} has shape {tuple(tensor.shape)}, but must have {shape}")
        if tensor.dtype not in _TYPES:
            raise ValueError(f"tensor {name} has type {tensor.dtype}, but must have a floating-point type")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"tensor {name} holds NaN or infinity")
