"""Requirements that an edit must meet to be exported as weights or as a constant vector."""

from __future__ import annotations

from pathlib import Path

from sealign.edits.affine_edit import AffineEdit
from sealign.edits.edit import Edit
from sealign.edits.layer_edit import LayerEdit
from sealign.errors import ExportError


def serve_or_attach(edit: Edit | LayerEdit) -> str:
    """Return what to do with an edit that cannot be exported: serve it, or attach it if a server refuses it.

    Args:
        edit: The edit, or the edit of one layer.

    Example:
        >>> import torch
        >>> serve_or_attach(AffineEdit.constant(torch.ones(3)))
        'serve it with sealign serve'
    """
    return "serve it with sealign serve" if edit.is_causal else "apply it in Python with sealign.attach"


def load_single_edit(source: str, *, strength: float | None = None) -> Edit:
    """Load the edit to export.

    Args:
        source: Folder of the edit, or its repository on the Hub as ``owner/name``.
        strength: Strength to use instead of the one stored with the edit.

    Raises:
        ExportError: The source joins several edits by a plus sign.
        EditFileError: The edit cannot be read, or was made by a method that does not edit activations.
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
        approximate: Whether to accept a rescaled edit, which is then exported without its rescaling; None if the
            export format has no such option.

    Raises:
        ExportError: The edit has a gate or a feature map, or is rescaled and ``approximate`` is not True.
    """
    check_ungated(edit)
    if not edit.is_affine:
        raise ExportError(
            f"the edit uses the feature map '{edit.feature_map}', which weights cannot compute; "
            f"{serve_or_attach(edit)}, or fit one with feature_map=identity"
        )
    if edit.normalization != "none" and not approximate:
        advice = "" if approximate is None else "pass --approximate to leave out the rescaling and measure the effect, "
        raise ExportError(
            f"the edit is rescaled per {edit.normalization}, which is not linear, so it cannot be exported exactly; "
            f"{advice}{serve_or_attach(edit)}, or fit one with normalization=none"
        )


def check_ungated(edit: Edit) -> None:
    """Raise an error if an edit has a gate, which no export can express.

    Args:
        edit: The edit to export.

    Raises:
        ExportError: The edit has a gate.
    """
    if edit.is_gated:
        raise ExportError(
            "the edit has a gate: it acts only on tokens whose activation passes a threshold, which weights and "
            f"constant vectors cannot express; {serve_or_attach(edit)}, or fit one without gate"
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
