"""GGUF exports for llama.cpp: an edit in the weights of a model file, or as a LoRA beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor, nn

from sealign.edits.edit import Edit
from sealign.errors import ExportError
from sealign.export.gguf_file import architecture_of, file_names, open_gguf, write_copy, write_small
from sealign.export.lora import lora_factors
from sealign.export.matrix_changes import MatrixChange, matrix_changes
from sealign.export.requirements import serve_or_attach
from sealign.files import check_file, new_file

WRITABLE = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.F16, Kind.BF16, Kind.F32)
"""Types that the ``gguf`` library can write, in ascending order of bits per weight."""

MIN_KEPT = 0.5
"""Smallest fraction of an edit that an exported file may keep; below it, the file is closer to the base model."""


@dataclass(frozen=True)
class RewrittenTensor:
    """A tensor of a GGUF file that carries the edit.

    Attributes:
        name: Name in the file.
        before: Its type in the base file.
        after: Its type now, which differs where the ``gguf`` library cannot write the original type.
        kept: Fraction of the change that is left after rounding, <new - old, wanted - old> / |wanted - old|^2.
    """

    name: str
    before: str
    after: str
    kept: float


def export_gguf(
    model: nn.Module,
    source: str | Path | None,
    edit: Edit,
    target: str | Path,
    *,
    approximate: bool = False,
    overwrite: bool = False,
    ignore_mismatch: bool = False,
) -> list[RewrittenTensor]:
    """Write a copy of a GGUF file with an edit in its weights.

    Each tensor is read in float32, changed, and quantised to its own type, or, where the library cannot write that
    type, to the smallest type that has at least as many bits per weight. Everything else is copied. Changes smaller
    than the steps of a type are rounded away, in four bits most of them; ``kept`` gives the fraction that is left.

    Args:
        model: The base model, for its structure and biases.
        source: GGUF file of the base model.
        edit: An affine edit of modules whose output is the output of a single matrix. A constant part needs a bias that
            the file has.
        target: File to write. It appears complete or not at all.
        approximate: Whether to leave out the rescaling of a rescaled edit.
        overwrite: Whether to replace an existing file.
        ignore_mismatch: Whether to accept a model with another fingerprint.

    Returns:
        The tensors that carry the edit.

    Raises:
        ExportError: The file cannot hold the edit, belongs to another model, would hold less than half of the edit
            after rounding, or a new weight is not finite.
        FingerprintError: The model is not the one that the edit was fitted on.
        EditFileError: The target is the base model's file, or exists and ``overwrite`` is False.
    """
    check_file(Path(target), overwrite=overwrite, sources=[] if source is None else [source])
    changes = matrix_changes(model, edit, approximate=approximate, ignore_mismatch=ignore_mismatch)
    reader = open_gguf(source)
    new_values = _new_values(reader, model, changes)
    written: dict[str, tuple[Any, Kind]] = {}
    rewritten: list[RewrittenTensor] = []
    for tensor in reader.tensors:
        if tensor.name in new_values:
            data, found = _rewrite(tensor, new_values[tensor.name], edit.width)
            written[tensor.name] = data, Kind[found.after]
            rewritten.append(found)
    _check_kept(rewritten)
    with new_file(Path(target)) as temporary:
        write_copy(reader, temporary, written)
    return rewritten


def export_gguf_lora(
    model: nn.Module,
    source: str | Path | None,
    edit: Edit,
    target: str | Path,
    *,
    approximate: bool = False,
    overwrite: bool = False,
    ignore_mismatch: bool = False,
) -> list[str]:
    """Write an edit as a GGUF LoRA for llama.cpp, with the factors of ``export_lora`` in float32.

    Args:
        model: The base model, with its weights.
        source: GGUF file of the base model, for the architecture and the names of tensors.
        edit: An edit that a LoRA adapter can carry.
        target: File to write. It appears complete or not at all.
        approximate: Whether to leave out the rescaling of a rescaled edit.
        overwrite: Whether to replace an existing file.
        ignore_mismatch: Whether to accept a model with another fingerprint.

    Returns:
        Names of the tensors that the LoRA changes.

    Raises:
        ExportError, FingerprintError: As for ``export_lora``.
        EditFileError: The target is the base model's file, or exists and ``overwrite`` is False.
    """
    check_file(Path(target), overwrite=overwrite, sources=[] if source is None else [source])
    factors = lora_factors(model, edit, approximate=approximate, ignore_mismatch=ignore_mismatch)
    reader = open_gguf(source)
    names = file_names(reader, model, [f"{path}.weight" for path in factors])
    writer = gguf.GGUFWriter(None, architecture_of(reader))
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(next(iter(factors.values())).a.shape[0]))
    for path, factor in factors.items():
        name = _required(names, f"{path}.weight")
        writer.add_tensor(f"{name}.lora_a", factor.a.numpy())
        writer.add_tensor(f"{name}.lora_b", factor.b.numpy())
    with new_file(Path(target)) as temporary:
        write_small(writer, temporary)
    return list(names.values())


def _required(names: Mapping[str, str], name: str) -> str:
    if name not in names:
        raise ExportError(f"the GGUF file has no tensor for '{name}'; give the GGUF file of the edit's base model")
    return names[name]


def _new_values(
    reader: gguf.GGUFReader, model: nn.Module, changes: Sequence[MatrixChange]
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return, by name in the file, the function from a tensor to its new value.

    Raises:
        ExportError: The edit changes a bias that the file does not have, or the file lacks a matrix.
    """
    wanted = [f"{change.matrix.path}.{kind}" for change in changes for kind in ("weight", "bias")]
    names = file_names(reader, model, wanted)
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for change in changes:
        weight, bias = (f"{change.matrix.path}.{kind}" for kind in ("weight", "bias"))
        stored = _required(names, weight)
        if change.changes_weight:
            found[stored] = change.new_weight
        if bias in names and (change.changes_weight or change.shift is not None):
            found[names[bias]] = change.new_bias
        elif bias not in names and (change.bias is not None or change.shift is not None):
            raise ExportError(
                f"the edit needs '{bias}', which the GGUF file does not have; export a merged checkpoint and convert "
                f"that with llama.cpp, or {serve_or_attach(change.layer_edit)}"
            )
    return found


def _rewrite(tensor: Any, change: Callable[[Tensor], Tensor], width: int) -> tuple[Any, RewrittenTensor]:
    try:
        old = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ExportError(
            f"'{tensor.name}' has type {tensor.tensor_type.name}, which the gguf library cannot read; give a --base "
            "with another type, such as Q8_0"
        ) from error
    if old.shape[0] != width:
        raise ExportError(
            f"'{tensor.name}' has {old.shape[0]} rows, but the edit has {width} features; give the GGUF file of the "
            "edit's base model"
        )
    new = change(torch.from_numpy(np.array(old, dtype=np.float64))).float().numpy()
    if not np.isfinite(new).all():
        raise ExportError(f"the new '{tensor.name}' holds NaN or infinity; use a lower strength")
    kind = _written_type(tensor.tensor_type, new.shape[-1])
    data = gguf.quants.quantize(new, kind)
    wanted, found = new - old, gguf.quants.dequantize(data, kind) - old
    energy = float(np.square(wanted).sum(dtype=np.float64))
    kept = float((found * wanted).sum(dtype=np.float64)) / energy if energy else 1.0
    return data, RewrittenTensor(tensor.name, tensor.tensor_type.name, kind.name, kept)


def mean_kept(rewritten: Sequence[RewrittenTensor]) -> float:
    """Return the mean fraction of the edit that is left after rounding, over all weights.

    Args:
        rewritten: The tensors that carry the edit.
    """
    counted = [tensor for tensor in rewritten if tensor.name.endswith(".weight")]
    return sum(tensor.kept for tensor in counted) / len(counted) if counted else 1.0


def _check_kept(rewritten: Sequence[RewrittenTensor]) -> None:
    # Such a file would hardly edit, and nothing else would show it.
    kept = mean_kept(rewritten)
    if kept < MIN_KEPT:
        kinds = ", ".join(sorted({tensor.after for tensor in rewritten}))
        raise ExportError(
            f"{kept:.0%} of the edit would be left after rounding to {kinds}, but at least {MIN_KEPT:.0%} must be; "
            "export it with --lora, which keeps all of it, or give a --base with wider weights, such as Q8_0 or F16"
        )


def _written_type(kind: Kind, width: int) -> Kind:
    """Return the type itself if the library can write it, else the smallest type with at least as many bits."""
    if kind in WRITABLE:
        return kind

    def bits(each: Kind) -> float:
        block, size = gguf.GGML_QUANT_SIZES[each]
        return 8 * size / block

    return next(each for each in WRITABLE if bits(each) >= bits(kind) and width % gguf.GGML_QUANT_SIZES[each][0] == 0)
