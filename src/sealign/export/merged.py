"""Merged checkpoints: an edit in the weights of a plain model, which any engine loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sealign.edits.edit import Edit
from sealign.edits.provenance import warn_of_other_checkpoint
from sealign.errors import ExportError
from sealign.export.deviation import DEVIATION_NAME, Deviation
from sealign.export.export_card import export_card
from sealign.export.matrix_changes import MatrixChange, matrix_changes
from sealign.export.module_check import check_merged
from sealign.export.requirements import serve_or_attach
from sealign.folders import MARK_NAME, check_folder, new_folder
from sealign.models.checkpoint_tensors import INDEX_NAME, CheckpointTensors, checkpoint_tensors, weight_files
from sealign.models.output_matrices import BIAS_SWITCHES
from sealign.models.pretrained import empty_model
from sealign.models.structure import text_config
from sealign.models.weights import stored_weights

_NOT_COPIED = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx")
_WRITTEN = (INDEX_NAME, "README.md", MARK_NAME, DEVIATION_NAME)


@dataclass(frozen=True)
class _Plan:
    """Changes that turn the base checkpoint into the merged one.

    Attributes:
        changed: Mapping from tensor name to the function that computes the new tensor from the stored one.
        added: Mapping from tensor name to the value of a bias that the base checkpoint lacks.
        switch: Configuration option to set to true so that the model has the added biases, or None.
    """

    changed: Mapping[str, Callable[[Tensor], Tensor]]
    added: Mapping[str, Tensor]
    switch: str | None


def export_merged(
    checkpoint: str | Path,
    edit: Edit,
    folder: str | Path,
    *,
    approximate: bool = False,
    deviation: Deviation | None = None,
    overwrite: bool = False,
    ignore_mismatch: bool = False,
) -> list[str]:
    """Write a checkpoint with an edit merged into its weights.

    See ``MatrixChange`` for the formulas. If the edit needs a bias that the checkpoint lacks, and the architecture has
    a configuration option that enables such biases, the option is set and all other new biases are zero. New values are
    computed in float64 and written in the stored data type. Files are processed one at a time, so peak memory is
    about the size of the largest file. The result is compared with the hooks on two tokens, one edited module at a
    time, before it takes its place.

    Args:
        checkpoint: Folder of the base model, with safetensors files.
        edit: An affine edit of modules whose output is the output of a single matrix.
        folder: Folder to write.
        approximate: Whether to leave out the rescaling of a rescaled edit.
        deviation: Measured effect of leaving it out, to write beside the export.
        overwrite: Whether to replace an earlier export.
        ignore_mismatch: Whether to accept a model with another fingerprint.

    Returns:
        Names of the tensors that are changed or added.

    Raises:
        ExportError: The edit cannot be merged, the checkpoint is quantised or not safetensors, a new weight is not
            finite, or the result does not compute what the hooks compute. Nothing is written.
        FingerprintError: The model is not the one that the edit was fitted on.
        EditFileError: The folder is that of the base model, holds an earlier export and ``overwrite`` is False, or
            holds something else.
    """
    source = Path(checkpoint)
    check_folder(Path(folder), overwrite=overwrite, sources=[source])
    model = _structure(source)
    stored, files = checkpoint_tensors(source, model), weight_files(source)
    changes = matrix_changes(model, edit, approximate=approximate, ignore_mismatch=ignore_mismatch)
    if not ignore_mismatch:
        warn_of_other_checkpoint(stored_weights(model, stored), [edit])
    plan = _plan(source, model, changes, edit.site, stored)
    with new_folder(Path(folder), overwrite=overwrite, sources=[source]) as temporary:
        _copy_others(source, temporary)
        _write_config(source, temporary, plan)
        for number, name in enumerate(files):
            _write_shard(source / name, temporary / name, plan, last=number == len(files) - 1)
        if len(files) > 1:
            _write_index(source, temporary, plan, files[-1])
        merged = _structure(temporary)
        check_merged(model, edit, changes, stored, merged, checkpoint_tensors(temporary, merged))
        export_card(edit, "Merged checkpoint", approximate=approximate).save(temporary / "README.md")
        if deviation is not None:
            deviation.save(temporary)
    return [*plan.changed, *plan.added]


def _structure(source: Path, **changes: Any) -> nn.Module:
    """Return the model on the meta device, with some values of its configuration changed."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source)
    for name, value in changes.items():
        setattr(config.get_text_config(decoder=True), name, value)
    model: nn.Module = empty_model(config)
    return model.eval()


def _plan(
    source: Path, model: nn.Module, changes: Sequence[MatrixChange], site: str, stored: CheckpointTensors
) -> _Plan:
    changed: dict[str, Callable[[Tensor], Tensor]] = {}
    shifts: dict[str, Tensor] = {}
    for change in changes:
        path = change.matrix.path
        if change.changes_weight:
            changed[stored.find(f"{path}.weight").name] = partial(_new_weight, change)
        if change.bias is not None and (change.changes_weight or change.shift is not None):
            changed[stored.find(f"{path}.bias").name] = change.new_bias
        elif change.shift is not None:
            shifts[f"{path}.bias"] = change.shift
    if not shifts:
        return _Plan(changed, {}, None)
    switch = BIAS_SWITCHES.get(site, "")
    added: dict[str, Tensor] = {}
    if hasattr(text_config(model), switch):
        biased, before = _structure(source, **{switch: True}).state_dict(), set(model.state_dict())
        shapes = {name: tensor.shape for name, tensor in biased.items() if name not in before}
        added = {name: shifts.get(name, torch.zeros(shape)) for name, shape in shapes.items()}
    missing = sorted(set(shifts) - set(added))
    if missing:
        raise ExportError(
            f"the edit adds a constant vector to the output of '{missing[0].removesuffix('.bias')}', which needs a "
            f"bias, and the configuration of this architecture cannot add one there; "
            f"{serve_or_attach(changes[0].layer_edit)}"
        )
    return _Plan(changed, {_bias_name(name, stored): tensor for name, tensor in added.items()}, switch)


def _bias_name(name: str, stored: CheckpointTensors) -> str:
    """Return the name of a new bias in the checkpoint, beside the weight that it belongs to."""
    return stored.find(name.removesuffix("bias") + "weight").name.removesuffix("weight") + "bias"


def _new_weight(change: MatrixChange, stored: Tensor) -> Tensor:
    """Return the new weight in the same orientation as the stored weight."""
    return change.new_weight(stored.T).T if change.matrix.transposed else change.new_weight(stored)


def _write_shard(source: Path, target: Path, plan: _Plan, *, last: bool) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    with safe_open(source, framework="pt") as shard:
        metadata = shard.metadata() or {"format": "pt"}
        for name in shard.keys():  # noqa: SIM118  not a dictionary
            tensor = shard.get_tensor(name)
            if name in plan.changed:
                tensor = _changed(name, tensor, plan.changed[name])
            tensors[name] = tensor
    if last:
        dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
        tensors |= {name: _finite(name, tensor.to(dtype)) for name, tensor in plan.added.items()}
    save_file(tensors, target, metadata=metadata)


def _changed(name: str, tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise ExportError(
            f"'{name}' is stored as {tensor.dtype}, which a merge cannot change; export a LoRA adapter, or merge into "
            "the checkpoint before quantisation"
        )
    return _finite(name, change(tensor).to(tensor.dtype)).contiguous()


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise ExportError(f"the new '{name}' holds NaN or infinity in {tensor.dtype}; use a lower strength")
    return tensor


def _copy_others(source: Path, target: Path) -> None:
    """Copy everything except weights: configuration, tokenizer, chat template, generation settings."""
    for entry in source.iterdir():
        if entry.is_file() and entry.suffix not in _NOT_COPIED and entry.name not in _WRITTEN:
            shutil.copyfile(entry, target / entry.name)


def _write_config(source: Path, target: Path, plan: _Plan) -> None:
    if plan.switch is None:
        return
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    nested = config.get("text_config")
    (nested if isinstance(nested, dict) else config)[plan.switch] = True
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_index(source: Path, target: Path, plan: _Plan, last: str) -> None:
    index = json.loads((source / INDEX_NAME).read_text(encoding="utf-8"))
    index["weight_map"] |= dict.fromkeys(plan.added, last)
    index.setdefault("metadata", {})["total_size"] = sum(
        tensor_bytes(target / name) for name in sorted(set(index["weight_map"].values()))
    )
    (target / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def tensor_bytes(path: Path) -> int:
    """Return the number of bytes of all tensors of a safetensors file, without its header.

    Args:
        path: A safetensors file.
    """
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - header - 8
