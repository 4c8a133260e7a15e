"""Attach an edit to a live model: until it is detached, or inside a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from sealign.edits.handle import EditHandle
from sealign.edits.intervention import Intervention
from sealign.errors import ModelError
from sealign.models.fingerprint import check_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach(
    model: PreTrainedModel | nn.Module,
    edit: Intervention,
    *,
    strength: float | None = None,
    ignore_mismatch: bool = False,
) -> EditHandle:
    """Attach an edit, or another intervention, to a model until the returned handle is detached.

    The output of each of the edit's modules is replaced by its edit. Several edits compose in the order in which they
    were attached: at a common module, a later one edits the result of an earlier one.

    Args:
        model: The model that the edit was fitted on; may be wrapped by PEFT or spread over devices.
        edit: What to attach.
        strength: In place of the edit's own.
        ignore_mismatch: Whether to accept a model with another fingerprint.

    Raises:
        FingerprintError: The model is not the one that the edit was fitted on, or lacks a module of it.
        ModelError: The model was compiled before; attach first and compile afterwards.
        SettingError: The strength is not finite, or the method has no strength.

    Example:
        >>> import sealign
        >>> model, tokenizer = sealign.load_model("smollm2")
        >>> demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=8)
        >>> config = sealign.SEAConfig(layers="last:1")
        >>> handle = attach(model, sealign.fit_edit(model, tokenizer, demonstrations, config=config))
        >>> handle.modules
        ['model.layers.29.mlp']
        >>> handle.detach()
    """
    if strength is not None:
        edit = edit.with_strength(strength)
    _refuse_compiled(model)
    if not ignore_mismatch:
        check_fingerprint(model, edit.base_model.fingerprint, edit.base_model.id)
    handle = EditHandle(edit)
    try:
        edit.install(model, handle)
    except BaseException:
        handle.detach()
        raise
    return handle


@contextmanager
def apply_edit(
    model: PreTrainedModel | nn.Module,
    edit: Intervention,
    *,
    strength: float | None = None,
    ignore_mismatch: bool = False,
) -> Iterator[EditHandle]:
    """Attach an edit inside a ``with`` block; afterwards the model computes bit for bit what it computed before.

    Blocks nest, and compose as described for ``attach``; an exception inside leaves nothing behind.

    Args:
        model, edit, strength, ignore_mismatch: As for ``attach``.

    Raises:
        FingerprintError, ModelError, SettingError: As for ``attach``.
    """
    handle = attach(model, edit, strength=strength, ignore_mismatch=ignore_mismatch)
    try:
        yield handle
    finally:
        handle.detach()


def _refuse_compiled(model: nn.Module) -> None:
    """Raise if a model is compiled: the graph does not see hooks that are registered later."""
    for path, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ModelError(
                f"the model is compiled{f' at {path}' if path else ''}, and a compiled graph does not see an edit that "
                "is attached later; attach the edit first, then compile"
            )
