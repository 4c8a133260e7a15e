"""An edit as a change of weights: which edits are linear, and which matrix carries them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sealign.edits.edit import Edit
from sealign.edits.linear_change import LinearChange
from sealign.errors import ExportError
from sealign.models.output_matrices import OutputMatrix, matrices_behind
from sealign.models.structure import unwrap_model


def check_linear(edit: Edit, *, approximate: bool = False) -> None:
    """Raise where an edit is not a linear function of the activation.

    Args:
        edit: the edit.
        approximate: let an edit that is rescaled pass, to be exported without its rescaling.

    Raises:
        ExportError: a feature map, or a rescaling that may not be left out.
    """
    settings = edit.settings
    if settings.feature_map != "identity":
        raise ExportError(
            f"the edit uses the feature map '{settings.feature_map}', which no change of weights can express; "
            "serve it with hooks, or fit a linear edit with --feature-map identity"
        )
    if settings.normalization != "none" and not approximate:
        raise ExportError(
            f"the edit is rescaled per {settings.normalization}, which is not linear, so weights carry it only "
            "approximately; pass --approximate to export it without rescaling and see by how much it differs, or fit "
            "with --normalization none"
        )


@torch.no_grad()
def output_matrices(model: nn.Module, edit: Edit) -> list[OutputMatrix]:
    """Find the matrix behind each module that an edit edits, by running the model once on two tokens.

    A matrix qualifies if what it puts out *is* what the module puts out, the same tensor: then a change of the one
    is the same change of the other, whatever the architecture. The model may be on the meta device.

    Args:
        model: the base model.
        edit: the edit.

    Raises:
        ExportError: the residual stream is edited, or a module's output is not that of one matrix, as in a mixture of
            experts; names the module.
    """
    if edit.settings.site == "residual":
        raise ExportError(
            "the edit acts on the residual stream, which is a sum that no single matrix puts out; fit one with --site "
            "mlp or --site attention, or serve this one with hooks"
        )
    base = unwrap_model(model)
    paths = {layer: edit.record.layers[str(layer)].module for layer in edit.layers}
    known = {name for name, _ in base.named_modules()}
    absent = [path for path in paths.values() if path not in known]
    if absent:
        raise ExportError(
            f"the model has no module '{absent[0]}', which the edit edits; name the edit's own with --model"
        )
    return matrices_behind(base, paths)


def widest(changes: Sequence[LinearChange]) -> int:
    """Return the largest rank among changes, at least 1."""
    return max(1, *(change.rank for change in changes))
