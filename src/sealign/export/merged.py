"""An edit folded into a checkpoint, file by file, so that any engine loads it as a plain model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sealign.edits.edit import Edit
from sealign.edits.linear_change import LinearChange, linear_change
from sealign.errors import ExportError
from sealign.export.export_card import export_card
from sealign.export.linearity import check_linear, output_matrices
from sealign.files import new_folder
from sealign.models.fingerprint import check_fingerprint
from sealign.models.output_matrices import OutputMatrix
from sealign.models.structure import text_config

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
BIAS_SWITCHES = {"mlp": "mlp_bias", "attention": "attention_bias"}
"""By site, the switch that gives its matrices a bias, in architectures that have one."""

_NOT_COPIED = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class _Plan:
    """What is written: new values by tensor name, as functions of the old ones, and tensors that are new."""

    changed: Mapping[str, tuple[LinearChange, bool]]
    added: Mapping[str, Tensor]
    switch: str | None


def export_merged(
    checkpoint: str | Path,
    edit: Edit,
    folder: str | Path,
    *,
    approximate: bool = False,
    ignore_mismatch: bool = False,
) -> list[str]:
    """Write a checkpoint with an edit in its weights, and return the names of the tensors that it changes.

    With x = W h + b the output of the matrix and x' = x + scale x + left (right x) + shift, the new weight is
    W + scale W + left (right W) and the new bias b + scale b + left (right b) + shift. A bias that the architecture
    does not have is switched on in its configuration where it can be, with zeros everywhere else. Shards are
    written one by one, computed in float64 and kept in their own type, so that memory holds one shard.

    Args:
        checkpoint: folder of the base model, with safetensors.
        edit: linear, on modules whose output is one matrix's.
        folder: where the new checkpoint goes; one that is there is replaced.
        approximate: leave out a rescaling.
        ignore_mismatch: export for a model with another fingerprint.

    Raises:
        ExportError: the edit cannot be folded, the checkpoint is quantised or not safetensors, or a new weight is not
            finite; nothing is written.
        FingerprintError: the model is not the edit's.
        EditFileError: the folder holds something else.
    """
    source = Path(checkpoint)
    check_linear(edit, approximate=approximate)
    files = _weight_files(source)
    model = _structure(source)
    if not ignore_mismatch:
        check_fingerprint(model, edit.record.model.fingerprint, edit.record.model.id)
    plan = _plan(source, model, edit, output_matrices(model, edit), set(_weight_map(source, files)))
    with new_folder(Path(folder), replaces="config.json") as temporary:
        _copy_others(source, temporary)
        _write_config(source, temporary, plan)
        for number, name in enumerate(files):
            _write_shard(source / name, temporary / name, plan, last=number == len(files) - 1)
        if len(files) > 1:
            _write_index(source, temporary, plan, files[-1])
        (temporary / "README.md").write_text(
            export_card(edit, f"{edit.record.model.id} with a spectral edit in its weights", approximate=approximate),
            encoding="utf-8",
        )
    return [*plan.changed, *plan.added]


def _weight_files(source: Path) -> list[str]:
    if (source / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    if (source / INDEX_NAME).is_file():
        weight_map = json.loads((source / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
        return sorted(set(weight_map.values()))
    raise ExportError(
        f"'{source}' has no safetensors weights; save the model with save_pretrained first, and export from that folder"
    )


def _weight_map(source: Path, files: Sequence[str]) -> dict[str, str]:
    """By tensor, its file."""
    from safetensors import safe_open

    found: dict[str, str] = {}
    for name in files:
        with safe_open(source / name, framework="pt") as shard:
            found |= dict.fromkeys(shard.keys(), name)
    return found


def _structure(source: Path, **changes: Any) -> nn.Module:
    """The model without its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source)
    for name, value in changes.items():
        setattr(config.get_text_config(decoder=True), name, value)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model.eval()


def _plan(source: Path, model: nn.Module, edit: Edit, matrices: Sequence[OutputMatrix], stored: set[str]) -> _Plan:
    changes = {matrix.path: linear_change(edit.projections[matrix.layer], edit.settings) for matrix in matrices}
    changed: dict[str, tuple[LinearChange, bool]] = {}
    shifts: dict[str, Tensor] = {}
    for matrix in matrices:
        change = changes[matrix.path]
        changed[_stored_name(f"{matrix.path}.weight", model, stored)] = (
            dataclasses.replace(change, shift=None),
            matrix.transposed,
        )
        if getattr(matrix.module, "bias", None) is not None:
            changed[_stored_name(f"{matrix.path}.bias", model, stored)] = (change, False)
        elif change.shift is not None:
            shifts[f"{matrix.path}.bias"] = change.shift
    if not shifts:
        return _Plan(changed, {}, None)
    switch = BIAS_SWITCHES.get(edit.settings.site, "")
    if not hasattr(text_config(model), switch):
        raise ExportError(
            f"the edit is centred, which needs a bias on '{matrices[0].path}', and this architecture has none to "
            "switch on; fit without --centered, or serve the edit with hooks"
        )
    shapes = {name: tensor.shape for name, tensor in _structure(source, **{switch: True}).state_dict().items()}
    before = set(model.state_dict())
    added = {name: shifts.get(name, torch.zeros(shape)) for name, shape in shapes.items() if name not in before}
    missing = set(shifts) - set(added)
    if missing:
        raise ExportError(
            f"the edit is centred, and '{switch}' gives no bias to '{min(missing)}'; fit without --centered, or serve "
            "the edit with hooks"
        )
    return _Plan(changed, added, switch)


def _stored_name(name: str, model: nn.Module, stored: set[str]) -> str:
    """The name of a tensor in the checkpoint, where the base model's prefix may be left out."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if candidate in stored:
            return candidate
    raise ExportError(
        f"the checkpoint has no tensor '{name}'; it is quantised or of another layout, export from the original"
    )


def _write_shard(source: Path, target: Path, plan: _Plan, *, last: bool) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    with safe_open(source, framework="pt") as shard:
        metadata = shard.metadata() or {"format": "pt"}
        for name in shard.keys():  # noqa: SIM118  not a dictionary
            tensor = shard.get_tensor(name)
            if name in plan.changed:
                change, transposed = plan.changed[name]
                tensor = _changed(name, tensor, change, transposed)
            tensors[name] = tensor
    if last:
        dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
        tensors |= {name: _finite(name, tensor.to(dtype)) for name, tensor in plan.added.items()}
    save_file(tensors, target, metadata=metadata)


def _changed(name: str, tensor: Tensor, change: LinearChange, transposed: bool) -> Tensor:
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise ExportError(
            f"'{name}' is stored as {tensor.dtype}, which a merge cannot change; export a LoRA, or merge into the "
            "checkpoint before quantisation"
        )
    columns = tensor.double()
    columns = columns[:, None] if columns.dim() == 1 else columns.T if transposed else columns
    columns = columns + change(columns)
    if change.shift is not None:
        columns = columns + change.shift[:, None]
    new = columns[:, 0] if tensor.dim() == 1 else columns.T if transposed else columns
    return _finite(name, new.to(tensor.dtype)).contiguous()


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise ExportError(f"the new '{name}' holds NaN or infinity in {tensor.dtype}; use a lower strength")
    return tensor


def _copy_others(source: Path, target: Path) -> None:
    """Configuration, tokenizer, chat template, generation settings: everything beside weights."""
    for entry in source.iterdir():
        if entry.is_file() and entry.suffix not in _NOT_COPIED and entry.name not in (INDEX_NAME, "README.md"):
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
    """Return the bytes of all tensors of a safetensors file, without its header."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - header - 8
