"""Attach an edit to a live model: until it is detached, or inside a ``with`` block."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sealign.edits.handle import EditHandle, Uncopied
from sealign.edits.intervention import Intervention
from sealign.edits.layer_edit import LayerEdit
from sealign.edits.provenance import warn_of_other_weights
from sealign.errors import NormalizationError, SettingError
from sealign.models.fingerprint import check_fingerprint
from sealign.models.structure import decoder_of, unwrap_model

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

    The model may be compiled before or after; changing the strength does not compile it again, while attaching,
    detaching and switching do, once for each combination. An attached edit belongs to the model object: its copies,
    pickles and saved weights are those of the base model, which a warning says.

    Args:
        model: The model that the edit was fitted on. It may be wrapped by PEFT or spread over devices.
        edit: Edit or other intervention.
        strength: Strength to use instead of the edit's own.
        ignore_mismatch: Whether to accept a model with another fingerprint, and other weights without a warning.

    Returns:
        The handle, by which the edit is switched, changed in strength, and detached.

    Raises:
        FingerprintError: The model is not the one that the edit was fitted on, or lacks one of the edited modules.
        SettingError: The strength is not finite, the method has no strength, or ``edit`` is no edit.
        SiteError: Layers of the model share a module of the edit.

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
    if not isinstance(edit, Intervention):
        given = repr(edit) if isinstance(edit, str | Path) else f"of type {type(edit).__name__}"
        raise SettingError(f"edit is {given}, but it must be an edit; read a folder with load_edit")
    if strength is not None:
        edit = edit.with_strength(strength)
    if not ignore_mismatch:
        check_fingerprint(model, edit.base_model.fingerprint, edit.base_model.id)
    handle = EditHandle(edit)
    try:
        edit.install(model, handle)
        if not ignore_mismatch:
            warn_of_other_weights(model, edit)
        base = unwrap_model(model)
        for whole in dict.fromkeys((base, decoder_of(base))):
            handle.stack.callback(whole.register_state_dict_pre_hook(_warn_when_saved(handle)).remove)
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
        FingerprintError, SettingError, SiteError: As for ``attach``.
    """
    handle = attach(model, edit, strength=strength, ignore_mismatch=ignore_mismatch)
    try:
        yield handle
    finally:
        handle.detach()


def _warn_when_saved(handle: EditHandle) -> Uncopied:
    """Return a hook of a model that says what its weights, which are about to be saved, do not hold."""

    def warn(_module: nn.Module, prefix: str, _keep_vars: bool) -> None:
        if handle.active and not prefix:  # a part of a model, which has a prefix, is read after the whole
            warnings.warn(
                f"the weights of the model are read while a {handle.edit.method} edit is attached, which is not part "
                "of them; save the edit with edit.save_pretrained, or merge it with export_merged",
                stacklevel=4,
            )

    return Uncopied(handle, warn)


def edit_output(module: nn.Module, layer_edit: LayerEdit, handle: EditHandle) -> None:
    """Register a forward hook that edits a module's output while a handle is active.

    Args:
        module: Module whose output is a tensor, or a tuple whose first element is edited.
        layer_edit: Edit of each token of the output.
        handle: Handle that switches the hook and removes it.
    """
    weight = next(module.parameters(), None)
    # Prepared here, so that neither the first call nor a compiled graph has to. An offloaded module has its weights
    # on the meta device until it runs.
    if weight is not None and not weight.is_meta:
        layer_edit.prepare(weight.device, weight.dtype)
        handle.strength_tensor(weight.device, weight.dtype)
    handle.add_hook(module, _EditHook(layer_edit, handle))


class _EditHook:
    """The forward hook of one edited module."""

    def __init__(self, layer_edit: LayerEdit, handle: EditHandle) -> None:
        self._layer_edit = layer_edit
        self._handle = handle

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        handle = self._handle
        if not handle.active:
            return None
        tokens = output[0] if isinstance(output, tuple) else output
        strength: Any = handle.strength
        if torch.compiler.is_compiling():
            strength = handle.strength_tensor(tokens.device, tokens.dtype)
        edited = self._layer_edit(tokens, strength)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited


class RejectFeatureCall:
    """Forward pre-hook of a model that refuses batches and cached decoding while a handle is active.

    Per-feature rescaling is not defined for them.

    Args:
        handle: Handle of the edit.
    """

    def __init__(self, handle: EditHandle) -> None:
        self.handle = handle

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise an error for arguments of the model that per-feature rescaling is not defined for."""
        if not self.handle.active:
            return
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            raise NormalizationError(
                "per-feature rescaling depends on all tokens of a sequence, so it is not defined in cached decoding; "
                "pass use_cache=False, or use normalization='token'"
            )
        if tokens is not None and tokens.shape[0] > 1:
            raise NormalizationError(
                f"per-feature rescaling is not defined for a batch of {tokens.shape[0]}, whose padding would count; "
                "run one sequence at a time, or use normalization='token'"
            )


def allows_batches(model: nn.Module) -> bool:
    """Return whether no edit on a model depends on later tokens, so that sequences can be run together."""
    hooks = unwrap_model(model)._forward_pre_hooks.values()
    functions = [hook.function for hook in hooks if isinstance(hook, Uncopied)]
    return not any(isinstance(function, RejectFeatureCall) and function.handle.active for function in functions)


def edits_tokens(hook: object) -> bool:
    """Return whether a forward hook is that of an edit, which changes each token by itself.

    Args:
        hook: A hook of a module.
    """
    return isinstance(hook, Uncopied) and isinstance(hook.function, _EditHook)
