"""What an edit must be so that weights or a constant vector can carry it."""

from __future__ import annotations

from pathlib import Path

from sealign.edits.edit import Edit
from sealign.edits.layer_edit import AffineEdit
from sealign.errors import ExportError

SERVE = "serve it with sealign serve"
"""Remedy that holds for every edit of activations."""


def load_single_edit(source: str, *, strength: float | None = None) -> Edit:
    """Load an edit of activations that is to be exported.

    Args:
        source: Folder of the edit, or its repository on the Hub as ``owner/name``.
        strength: In place of the edit's own.

    Raises:
        ExportError: Several edits are joined by a plus.
        EditFileError: The edit cannot be read, or belongs to a method that does not edit activations.
        SettingError: The strength is not finite.
    """
    if "+" in source and not Path(source).is_dir():
        raise ExportError(f"'{source}' names {source.count('+') + 1} edits, but only one can be exported; name one")
    edit = Edit.from_pretrained(source)
    return edit if strength is None else edit.with_strength(strength)


def check_exportable(edit: Edit, *, approximate: bool | None = None) -> None:
    """Raise an error unless each edited activation is an affine function of the activation.

    Args:
        edit: The edit to export.
        approximate: Whether to accept a rescaled edit, which is then exported without its rescaling; None if the form
            of export has no such option.

    Raises:
        ExportError: The edit has a feature map, or is rescaled and ``approximate`` is not True.
    """
    if not edit.is_affine:
        raise ExportError(
            f"the edit uses the feature map '{edit.feature_map}', which weights cannot compute; {SERVE}, or fit one "
            "with feature_map=identity"
        )
    if edit.normalization != "none" and not approximate:
        advice = "" if approximate is None else "pass --approximate to leave out the rescaling and measure the effect, "
        raise ExportError(
            f"the edit is rescaled per {edit.normalization}, which is not linear, so that it cannot be exported "
            f"exactly; {advice}{SERVE}, or fit one with normalization=none"
        )


def is_shift(layer_edit: AffineEdit) -> bool:
    """Return whether the edit of a layer only adds a constant vector to the activation.

    Args:
        layer_edit: Edit of one layer.

    Example:
        >>> import torch
        >>> is_shift(AffineEdit.constant(torch.ones(3)))
        True
        >>> is_shift(AffineEdit(torch.ones(3, 1), torch.ones(1, 3)))
        False
    """
    return not layer_edit.scale and not (bool(layer_edit.left.any()) and bool(layer_edit.right.any()))
