"""Attach an edit to a live model: until it is detached, or inside a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from sealign.edits.handle import EditHandle
from sealign.edits.intervention import Intervention
from sealign.edits.layer_edit import LayerEdit
from sealign.errors import ModelError, NormalizationError
from sealign.models.fingerprint import check_fingerprint
from sealign.models.structure import unwrap_model

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
        model: The model that the edit was fitted on. It may be wrapped by PEFT or spread over devices.
        edit: Edit or other intervention.
        strength: Strength to use instead of the edit's own.
        ignore_mismatch: Whether to accept a model with another fingerprint.

    Returns:
        The handle, by which the edit is switched, changed in strength, and detached.

    Raises:
        FingerprintError: The model is not the one that the edit was fitted on, or lacks one of the edited modules.
        ModelError: The model is compiled already; attach first and compile afterwards.
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
    """Raise an error if a model is compiled, since its graph would ignore hooks that are registered later."""
    for path, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ModelError(
                f"the model is compiled{f' at {path}' if path else ''}, and a compiled graph does not see an edit that "
                "is attached later; attach the edit first, then compile"
            )


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
    handle.stack.callback(module.register_forward_hook(_EditHook(layer_edit, handle)).remove)


class _EditHook:
    """The forward hook of one edited module."""

    def __init__(self, layer_edit: LayerEdit, handle: EditHandle) -> None:
        self._layer_edit = layer_edit
        self._handle = handle

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        handle = self._handle
        if not handle.active:
            return None
        strength: Any = handle.strength
        if isinstance(output, tuple):
            return (self._layer_edit(output[0], strength), *output[1:])
        return self._layer_edit(output, strength)


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
    return not any(isinstance(hook, RejectFeatureCall) and hook.handle.active for hook in hooks)
