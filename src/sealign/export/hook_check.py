"""The checks of an export against the hooks on two tokens, before it is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from sealign.edits.attach import apply_edit, edit_output
from sealign.edits.edit import Edit
from sealign.edits.handle import EditHandle
from sealign.errors import ExportError
from sealign.models.eval_mode import eval_mode
from sealign.models.output_matrices import OutputMatrix
from sealign.models.pretrained import auto_model, quiet_transformers
from sealign.models.structure import input_device, unwrap_model

TOLERANCE = 0.01
"""Largest accepted difference of a logit, as a fraction of the largest change of a logit."""


@torch.no_grad()
def check_hooks(model: nn.Module, edit: Edit, matrices: Sequence[OutputMatrix]) -> None:
    """Raise an error unless an edit at the outputs of matrices gives the logits of its hooks, on two tokens.

    Args:
        model: The base model, with its weights.
        edit: The edit; its rescaling, if any, is left out.
        matrices: The matrix behind each edited module.

    Raises:
        ExportError: The logits differ.
    """
    base, plain = unwrap_model(model), edit.with_normalization("none")
    with eval_mode(base):
        before = _logits(base)
        with apply_edit(base, plain, ignore_mismatch=True):
            expected = _logits(base)
        handle = EditHandle(plain)
        with handle.stack:
            for matrix in matrices:
                edit_output(matrix.module, plain.layer_edits[matrix.layer], handle)
            found = _logits(base)
    _compare(f"an edit of '{matrices[0].path}' and its like" if matrices else "no edit", before, expected, found)


@torch.no_grad()
def check_checkpoint(source: Path, merged: Path, edit: Edit) -> None:
    """Raise an error unless a merged checkpoint gives the logits of the hooks, on two tokens, up to rounding.

    Each checkpoint is loaded in float32 on the CPU; nothing is checked if half of the free memory cannot hold it.

    Args:
        source: Folder of the base model.
        merged: Folder of the merged checkpoint.
        edit: The edit; its rescaling, if any, is left out.

    Raises:
        ExportError: The logits differ, or the merged checkpoint lacks tensors of its model.
    """
    size = sum(file.stat().st_size for file in merged.glob("*.safetensors"))
    config = AutoConfig.from_pretrained(source)
    stored = getattr(config.get_text_config(decoder=True), "dtype", None) or torch.float32
    if size * 4 / stored.itemsize > psutil.virtual_memory().available / 2:
        return
    base = _load(source)
    before = _logits(base)
    with apply_edit(base, edit.with_normalization("none"), ignore_mismatch=True):
        expected = _logits(base)
    del base
    _compare("the merged checkpoint", before, expected, _logits(_load(merged)), rounding=torch.finfo(stored).eps)


def _load(folder: Path) -> Any:
    with quiet_transformers():
        model, report = auto_model(AutoConfig.from_pretrained(folder)).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    if report["missing_keys"] or report["mismatched_keys"]:
        broken = [*report["missing_keys"], *report["mismatched_keys"]]
        raise ExportError(f"the checkpoint has no '{broken[0]}' of its model; check the base model's files")
    return model.eval()


def _compare(what: str, before: Tensor, expected: Tensor, found: Tensor, *, rounding: float = 0.0) -> None:
    gap, effect = (float((one - other).abs().max()) for one, other in ((found, expected), (expected, before)))
    # Rounding of weights changes logits by a few times its relative size.
    if not gap <= TOLERANCE * effect + 8 * rounding * float(expected.abs().max()):
        raise ExportError(
            f"{what} changes logits by {gap:.2g} from those of the hooks, of a largest change of {effect:.2g}, so "
            "weights do not carry the edit; serve it with sealign serve"
        )


def _logits(model: Any) -> Tensor:
    ids = torch.tensor([[1, 2]], device=input_device(model))
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.double()
