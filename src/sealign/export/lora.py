"""LoRA adapters: an edit as a low-rank update that PEFT and servers load."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sealign.edits.edit import Edit
from sealign.edits.provenance import warn_of_other_checkpoint
from sealign.errors import ExportError
from sealign.export.deviation import Deviation
from sealign.export.export_card import export_card
from sealign.export.matrix_changes import LoraFactors, MatrixChange, matrix_changes
from sealign.export.module_check import check_lora
from sealign.export.requirements import serve_or_attach
from sealign.files import write_tensors
from sealign.folders import check_folder, new_folder
from sealign.models.checkpoint_tensors import CheckpointTensors
from sealign.models.output_matrices import read_weight
from sealign.models.weights import stored_weights

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = "adapter_model.safetensors"


def export_lora(
    model: nn.Module,
    edit: Edit,
    folder: str | Path,
    *,
    checkpoint: CheckpointTensors | None = None,
    approximate: bool = False,
    deviation: Deviation | None = None,
    overwrite: bool = False,
    ignore_mismatch: bool = False,
) -> list[str]:
    """Write an edit as a PEFT LoRA adapter.

    With x = W h the output of a matrix, x' = x + s left (right x) is W + B A with B = s left and A = right W. All
    layers get the same rank, padded with zeros, because servers require one; lora_alpha equals it, so the scale is 1.

    Args:
        model: The base model, with its weights; without them, on the meta device, if a checkpoint is given.
        edit: An affine edit of low rank and without a constant part, of modules whose output is the output of a single
            matrix.
        folder: Folder to write.
        checkpoint: Tensors of the base model, one of which at a time is in memory: those of the edited modules, to make
            the factors and to compare them with the hooks, and all, if they are in files, to know the model again.
        approximate: Whether to leave out the rescaling of a rescaled edit.
        deviation: Measured effect of leaving it out, to write beside the export.
        overwrite: Whether to replace an earlier export.
        ignore_mismatch: Whether to accept a model with another fingerprint.

    Returns:
        Dotted paths of the matrices that the adapter changes.

    Raises:
        ExportError: A LoRA adapter cannot carry the edit; says why, and what can.
        FingerprintError: The model is not the one that the edit was fitted on.
        EditFileError: The folder is that of the base model, holds an earlier export and ``overwrite`` is False, or
            holds something else.
    """
    from peft import LoraConfig

    sources = [edit.base_model.id]  # which may be a folder
    check_folder(Path(folder), overwrite=overwrite, sources=sources)
    factors = lora_factors(model, edit, checkpoint=checkpoint, approximate=approximate, ignore_mismatch=ignore_mismatch)
    matrices = [factor.matrix for factor in factors.values()]
    rank = next(iter(factors.values())).a.shape[0]
    tensors: dict[str, Tensor] = {}
    for path, factor in factors.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = factor.a
        tensors[f"base_model.model.{path}.lora_B.weight"] = factor.b
    config = LoraConfig(
        base_model_name_or_path=edit.base_model.id,
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank,
        target_modules=list(factors),  # whole paths, which PEFT joins when it combines adapters
        fan_in_fan_out=matrices[0].transposed,
        inference_mode=True,
    )
    with new_folder(Path(folder), overwrite=overwrite, sources=sources) as temporary:
        write_tensors(temporary / ADAPTER_TENSORS, tensors)
        config.save_pretrained(str(temporary))
        card = export_card(edit, "LoRA adapter", library="peft", approximate=approximate)
        card.save(temporary / "README.md")
        if deviation is not None:
            deviation.save(temporary)
    return list(factors)


def lora_factors(
    model: nn.Module,
    edit: Edit,
    *,
    checkpoint: CheckpointTensors | None = None,
    approximate: bool = False,
    ignore_mismatch: bool = False,
) -> dict[str, LoraFactors]:
    """Return the factors of each matrix that an edit changes, by path of the matrix, padded to a common rank.

    Args:
        model, edit, checkpoint, approximate, ignore_mismatch: As for ``export_lora``.

    Raises:
        ExportError, FingerprintError: As for ``export_lora``.
    """
    changes = matrix_changes(model, edit, approximate=approximate, ignore_mismatch=ignore_mismatch)
    if checkpoint is not None and not ignore_mismatch:
        warn_of_other_checkpoint(stored_weights(model, checkpoint), [edit])
    for change in changes:
        _check_low_rank(change, _bias(change, checkpoint))
    rank = max(1, *(change.layer_edit.rank for change in changes))
    factors = [_factors(change, _weight(change, checkpoint), rank) for change in changes]
    if checkpoint is not None:
        check_lora(model, edit, factors, checkpoint)
    return {factor.matrix.path: factor for factor in factors}


def _weight(change: MatrixChange, checkpoint: CheckpointTensors | None) -> Float[Tensor, "out in"]:
    if checkpoint is None:
        return read_weight(change.matrix)
    stored = checkpoint.find(f"{change.matrix.path}.weight").read()
    if not stored.is_floating_point() or stored.element_size() < 2:
        raise ExportError(
            f"the weight of '{change.matrix.path}' is stored as {stored.dtype}; export from the model before "
            "quantisation"
        )
    return (stored.T if change.matrix.transposed else stored).float()


def _bias(change: MatrixChange, checkpoint: CheckpointTensors | None) -> Float[Tensor, " out"] | None:
    if checkpoint is None or change.bias is None:
        return change.bias
    return checkpoint.find(f"{change.matrix.path}.bias").read()


def _check_low_rank(change: MatrixChange, bias: Tensor | None) -> None:
    path = change.matrix.path
    remedy = f"export a merged checkpoint, or {serve_or_attach(change.layer_edit)}"
    if change.strength and change.layer_edit.scale:
        raise ExportError(
            f"the edit also scales the whole output of '{path}', which a LoRA adapter of low rank cannot do; {remedy}"
        )
    if change.shift is not None:
        raise ExportError(
            f"the edit adds a constant vector to the output of '{path}', which needs a bias, and a LoRA adapter has "
            f"none; {remedy}"
        )
    if bias is not None and not torch.equal(
        change.new_bias(bias.detach().double().cpu()), bias.detach().double().cpu()
    ):
        raise ExportError(f"the edit changes the bias of '{path}', which a LoRA adapter cannot do; {remedy}")


def _factors(change: MatrixChange, weight: Float[Tensor, "out in"], rank: int) -> LoraFactors:
    left, right = change.layer_edit.left.double().cpu(), change.layer_edit.right.double().cpu()
    a, b = right @ weight.double(), change.strength * left
    padding = rank - change.layer_edit.rank
    a = torch.nn.functional.pad(a, (0, 0, 0, padding))
    b = torch.nn.functional.pad(b, (0, padding))
    a, b = a.float().contiguous(), b.float().contiguous()
    if not bool(a.isfinite().all() and b.isfinite().all()):
        raise ExportError(
            f"the update of '{change.matrix.path}' holds NaN or infinity in float32; use a lower strength"
        )
    return LoraFactors(change.matrix, a, b)
