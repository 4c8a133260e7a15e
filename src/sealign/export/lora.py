"""An edit as a LoRA adapter that PEFT and servers load as any other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sealign.edits.edit import Edit
from sealign.edits.linear_change import LinearChange, linear_change
from sealign.errors import ExportError
from sealign.export.export_card import export_card
from sealign.export.linearity import check_linear, output_matrices, widest
from sealign.files import new_folder, write_tensors
from sealign.models.fingerprint import check_fingerprint
from sealign.models.output_matrices import OutputMatrix, read_weight
from sealign.models.structure import unwrap_model

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = "adapter_model.safetensors"


@dataclass(frozen=True)
class LoraFactors:
    """The change B A of one matrix.

    Attributes:
        matrix: the matrix.
        a: A, (r, in), float32.
        b: B, (out, r), float32.
    """

    matrix: OutputMatrix
    a: Float[Tensor, "r in"]
    b: Float[Tensor, "out r"]


def export_lora(
    model: nn.Module,
    edit: Edit,
    folder: str | Path,
    *,
    approximate: bool = False,
    ignore_mismatch: bool = False,
) -> list[str]:
    """Write an edit as a PEFT LoRA adapter, and return the paths of the matrices that it changes.

    With x = W h the output of the matrix, x' = x + left (right x) is W + B A with B = left and A = right W. All
    layers have one rank, padded with zeros, since servers want one; lora_alpha equals it, so that the scale is 1.

    Args:
        model: the base model, with its weights.
        edit: linear, not centred, of a change that is of low rank, on modules whose output is one matrix's.
        folder: where the adapter goes; an adapter that is there is replaced.
        approximate: leave out a rescaling.
        ignore_mismatch: export for a model with another fingerprint.

    Raises:
        ExportError: a LoRA cannot carry the edit; says why, and what can.
        FingerprintError: the model is not the edit's.
        EditFileError: the folder holds something else.
    """
    from peft import LoraConfig

    factors = lora_factors(model, edit, approximate=approximate, ignore_mismatch=ignore_mismatch)
    matrices = [factor.matrix for factor in factors.values()]
    rank = next(iter(factors.values())).a.shape[0]
    tensors: dict[str, Tensor] = {}
    for path, factor in factors.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = factor.a
        tensors[f"base_model.model.{path}.lora_B.weight"] = factor.b
    config = LoraConfig(
        base_model_name_or_path=edit.record.model.id,
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank,
        target_modules=[_suffix(model, matrices)],
        layers_to_transform=[matrix.layer for matrix in matrices],
        fan_in_fan_out=matrices[0].transposed,
        inference_mode=True,
    )
    with new_folder(Path(folder), replaces=ADAPTER_CONFIG) as temporary:
        write_tensors(temporary / ADAPTER_TENSORS, tensors)
        config.save_pretrained(str(temporary))
        (temporary / "README.md").write_text(
            export_card(edit, "A spectral edit as a LoRA adapter", library="peft", approximate=approximate),
            encoding="utf-8",
        )
    return list(factors)


def lora_factors(
    model: nn.Module, edit: Edit, *, approximate: bool = False, ignore_mismatch: bool = False
) -> dict[str, LoraFactors]:
    """Return the factors of each matrix that an edit changes, by its path, of one rank for all.

    Args:
        model, edit, approximate, ignore_mismatch: as for ``export_lora``.

    Raises:
        ExportError, FingerprintError: as ``export_lora``.
    """
    check_linear(edit, approximate=approximate)
    if not ignore_mismatch:
        check_fingerprint(model, edit.record.model.fingerprint, edit.record.model.id)
    changes = {layer: linear_change(edit.projections[layer], edit.settings) for layer in edit.layers}
    matrices = output_matrices(model, edit)
    for matrix in matrices:
        _check_low_rank(changes[matrix.layer], matrix, edit)
    rank = widest(list(changes.values()))
    return {matrix.path: _factors(matrix, changes[matrix.layer], rank) for matrix in matrices}


def _check_low_rank(change: LinearChange, matrix: OutputMatrix, edit: Edit) -> None:
    merged = "export a merged checkpoint instead"
    if change.scale:
        raise ExportError(
            f"the combination '{edit.settings.combine}' also scales the whole activation, which a LoRA of low rank "
            f"cannot do; {merged}"
        )
    if change.shift is not None:
        raise ExportError(f"the edit is centred, which needs a bias that a LoRA does not have; {merged}")
    bias = getattr(matrix.module, "bias", None)
    if bias is not None and bool(change(bias.detach().double().cpu()[:, None]).abs().max() > 0):
        raise ExportError(f"'{matrix.path}' has a bias, which the edit changes and a LoRA cannot; {merged}")


def _factors(matrix: OutputMatrix, change: LinearChange, rank: int) -> LoraFactors:
    """The factors, padded to the common rank."""
    a, b = change.right @ read_weight(matrix).double(), change.left
    padding = rank - change.rank
    a = torch.nn.functional.pad(a, (0, 0, 0, padding))
    b = torch.nn.functional.pad(b, (0, padding))
    return LoraFactors(matrix, a.float().contiguous(), b.float().contiguous())


def _suffix(model: nn.Module, matrices: Sequence[OutputMatrix]) -> str:
    """The shortest end of the matrices' paths that, in their layers, no other module has."""
    wanted = {matrix.path for matrix in matrices}
    layers = {str(matrix.layer) for matrix in matrices}
    names = [name for name, _ in unwrap_model(model).named_modules()]
    parts = matrices[0].path.split(".")
    for length in range(1, len(parts)):
        suffix = ".".join(parts[-length:])
        found = {name for name in names if name.endswith(f".{suffix}") and layers & set(name.split("."))}
        if found == wanted:
            return suffix
    raise ExportError(
        f"no common name tells '{matrices[0].path}' from other modules; export a merged checkpoint instead"
    )
