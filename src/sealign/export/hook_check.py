"""The check of an export against the hooks on two tokens, before it is written, where the model is in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sealign.edits.attach import apply_edit, edit_output
from sealign.edits.edit import Edit
from sealign.edits.handle import EditHandle
from sealign.errors import ExportError
from sealign.models.eval_mode import eval_mode
from sealign.models.output_matrices import OutputMatrix
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


def _compare(what: str, before: Tensor, expected: Tensor, found: Tensor) -> None:
    gap, effect = (float((one - other).abs().max()) for one, other in ((found, expected), (expected, before)))
    if not gap <= TOLERANCE * effect:
        raise ExportError(
            f"{what} changes logits by {gap:.2g} from those of the hooks, of a largest change of {effect:.2g}, so "
            "weights do not carry the edit; serve it with sealign serve"
        )


def _logits(model: Any) -> Tensor:
    ids = torch.tensor([[1, 2]], device=input_device(model))
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.double()
