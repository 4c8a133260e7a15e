"""An edit for llama.cpp: in the weights of a GGUF file, or beside it as a GGUF LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import nn

from sealign.edits.edit import Edit
from sealign.edits.linear_change import LinearChange, linear_change
from sealign.errors import ExportError
from sealign.export.linearity import check_linear, output_matrices
from sealign.export.lora import lora_factors
from sealign.files import new_file
from sealign.models.fingerprint import check_fingerprint
from sealign.models.structure import text_config

WRITTEN = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.F16, Kind.BF16, Kind.F32)
"""Types that the library can write, by rising bits a weight."""

LEAST_KEPT = 0.5
"""The least share of an edit that a file must hold: with less it is nearer to the base model than to the edited one."""


@dataclass(frozen=True)
class Rewritten:
    """A tensor that carries the edit.

    Attributes:
        name: in the file.
        before: its type in the base file.
        after: its type now; another one where the library cannot write the first.
        kept: how much of the change is left after rounding, <new - old, wanted - old> / |wanted - old|^2; 1 is all.
    """

    name: str
    before: str
    after: str
    kept: float


def export_gguf(
    model: nn.Module,
    source: str | Path,
    edit: Edit,
    target: str | Path,
    *,
    approximate: bool = False,
    ignore_mismatch: bool = False,
) -> list[Rewritten]:
    """Write a copy of a GGUF file with an edit in its weights, and return the tensors that carry it.

    Each is read in float32, changed, and quantised again in its own type, or, where the library cannot write that, in
    the type of the fewest bits a weight that is not below it. All else is copied as it is. A change that is smaller
    than the steps of a type is rounded away, most of it in four bits: ``kept`` tells what is left, and a file that
    would hold less than half of the edit is refused.

    Args:
        model: the base model, for its structure; weights are not used.
        source: GGUF file of the base model.
        edit: linear and not centred, on modules whose output is one matrix's.
        target: the file to write; appears whole or not at all.
        approximate: leave out a rescaling.
        ignore_mismatch: export for a model with another fingerprint.

    Raises:
        ExportError: the edit cannot be folded, the file is of another model, a new weight is not finite, or rounding to
            the types of the file would leave less than half of the edit.
        FingerprintError: the model is not the edit's.
    """
    check_linear(edit, approximate=approximate)
    if not ignore_mismatch:
        check_fingerprint(model, edit.record.model.fingerprint, edit.record.model.id)
    reader = _open(source)
    changes = _changes(model, edit)
    names = _tensor_names(reader, model, changes)
    rewritten: dict[str, tuple[Any, Rewritten]] = {}
    for tensor in reader.tensors:
        if tensor.name in names:
            rewritten[tensor.name] = _rewrite(tensor, changes[names[tensor.name]])
    _check_kept([found for _, found in rewritten.values()], edit)
    with new_file(Path(target)) as temporary:
        _write(reader, temporary, {name: (data, Kind[found.after]) for name, (data, found) in rewritten.items()})
    return [found for _, found in rewritten.values()]


def export_gguf_lora(
    model: nn.Module,
    source: str | Path,
    edit: Edit,
    target: str | Path,
    *,
    approximate: bool = False,
    ignore_mismatch: bool = False,
) -> list[str]:
    """Write an edit as a GGUF LoRA for llama.cpp, and return the names of the tensors that it changes.

    The factors are those of ``export_lora``, in float32; the base file gives the architecture and the names.

    Args:
        model: the base model, with its weights.
        source: GGUF file of the base model.
        edit: one that a LoRA can carry.
        target: the file to write.
        approximate: leave out a rescaling.
        ignore_mismatch: export for a model with another fingerprint.

    Raises:
        ExportError, FingerprintError: as ``export_lora``.
    """
    factors = lora_factors(model, edit, approximate=approximate, ignore_mismatch=ignore_mismatch)
    reader = _open(source)
    names = {path: name for name, path in _tensor_names(reader, model, factors).items()}
    writer = gguf.GGUFWriter(None, _architecture(reader))
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(next(iter(factors.values())).a.shape[0]))
    for path, factor in factors.items():
        writer.add_tensor(f"{names[path]}.lora_a", factor.a.numpy())
        writer.add_tensor(f"{names[path]}.lora_b", factor.b.numpy())
    with new_file(Path(target)) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return list(names.values())


def _open(source: str | Path) -> gguf.GGUFReader:
    if not Path(source).is_file():
        raise ExportError(f"there is no file '{source}'; give the GGUF file of the base model")
    try:
        return gguf.GGUFReader(str(source))
    except (ValueError, OSError) as error:
        raise ExportError(f"'{source}' cannot be read as GGUF ({error}); check the file") from error


def _architecture(reader: gguf.GGUFReader) -> str:
    field = reader.get_field(gguf.Keys.General.ARCHITECTURE)
    return "" if field is None else str(field.contents())


def _changes(model: nn.Module, edit: Edit) -> dict[str, LinearChange]:
    """By path of the matrix, the change; a GGUF file has no place for a bias that is not there."""
    found = {}
    for matrix in output_matrices(model, edit):
        change = linear_change(edit.projections[matrix.layer], edit.settings)
        if change.shift is not None or getattr(matrix.module, "bias", None) is not None:
            raise ExportError(
                f"the edit needs a bias at '{matrix.path}' that differs from the base model's, which this export does "
                "not write; export a merged checkpoint and convert that with llama.cpp"
            )
        found[matrix.path] = change
    return found


def _tensor_names(reader: gguf.GGUFReader, model: nn.Module, paths: Mapping[str, Any]) -> dict[str, str]:
    """By tensor of the file, the path of the matrix that it holds."""
    architecture = _architecture(reader)
    known = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise ExportError(
            f"the architecture '{architecture}' of the GGUF file is not known to the gguf library; upgrade it"
        )
    table = gguf.get_tensor_name_map(known[architecture], text_config(model).num_hidden_layers)
    present = {tensor.name for tensor in reader.tensors}
    found = {}
    for path in paths:
        name = table.get_name(f"{path}.weight", try_suffixes=(".weight",))
        if name not in present:
            raise ExportError(
                f"the GGUF file has no tensor for '{path}' (looked for '{name}'); give its base model's file"
            )
        found[str(name)] = path
    return found


def _rewrite(tensor: Any, change: LinearChange) -> tuple[Any, Rewritten]:
    try:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ExportError(
            f"'{tensor.name}' is {tensor.tensor_type.name}, which the gguf library cannot read"
        ) from error
    columns = torch.from_numpy(np.array(weight, dtype=np.float64))
    if columns.shape[0] != change.left.shape[0]:
        raise ExportError(
            f"'{tensor.name}' has {columns.shape[0]} rows, the edit {change.left.shape[0]}; give its base model's file"
        )
    new = (columns + change(columns)).float().numpy()
    if not np.isfinite(new).all():
        raise ExportError(f"the new '{tensor.name}' holds NaN or infinity; use a lower strength")
    kind = _written_type(tensor.tensor_type, new.shape[-1])
    data = gguf.quants.quantize(new, kind)
    wanted, found = new - weight, gguf.quants.dequantize(data, kind) - weight
    kept = float((found * wanted).sum(dtype=np.float64) / max(np.square(wanted).sum(dtype=np.float64), 1e-30))
    return data, Rewritten(tensor.name, tensor.tensor_type.name, kind.name, kept)


def _check_kept(rewritten: Sequence[Rewritten], edit: Edit) -> None:
    """A change that is smaller than the steps of a type is rounded away; such a file would silently not edit."""
    kept = sum(tensor.kept for tensor in rewritten) / len(rewritten)
    if kept < LEAST_KEPT and edit.settings.strength != 0:
        kinds = ", ".join(sorted({tensor.after for tensor in rewritten}))
        raise ExportError(
            f"of the edit, {kept:.0%} would be left after rounding to {kinds}, but at least {LEAST_KEPT:.0%} must be; "
            "export it with --lora, which keeps all of it, or give a --base with wider weights, such as Q8_0 or F16"
        )


def _written_type(kind: Kind, width: int) -> Kind:
    """The type to write: the same if the library can, else the smallest that is not below it."""
    if kind in WRITTEN:
        return kind

    def bits(each: Kind) -> float:
        block, size = gguf.GGML_QUANT_SIZES[each]
        return 8 * size / block

    return next(each for each in WRITTEN if bits(each) >= bits(kind) and width % gguf.GGML_QUANT_SIZES[each][0] == 0)


def _write(reader: gguf.GGUFReader, target: Path, changed: Mapping[str, tuple[Any, Kind]]) -> None:
    """Copy a file, with other data for some tensors."""
    writer = gguf.GGUFWriter(target, _architecture(reader), endianess=reader.endianess)
    for field in reader.fields.values():
        if field.name == gguf.Keys.General.ARCHITECTURE or field.name.startswith("GGUF."):
            continue  # the writer writes these itself
        kind = field.types[0]
        element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        if field.contents() is not None:
            writer.add_key_value(field.name, field.contents(), kind, sub_type=element)
    for tensor in reader.tensors:
        data, kind = changed.get(tensor.name, (tensor.data, tensor.tensor_type))
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        data, _ = changed.get(tensor.name, (tensor.data, None))
        writer.write_tensor_data(np.ascontiguousarray(data), tensor_endianess=reader.endianess)
    writer.close()
