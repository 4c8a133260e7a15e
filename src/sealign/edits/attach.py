"""Edit a live model: by context manager, or attached until detached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from sealign.edits.edit import Edit
from sealign.edits.layer_edit import LayerEdit
from sealign.errors import FingerprintError, ModelError, NormalizationError, SettingError
from sealign.models.fingerprint import check_fingerprint
from sealign.models.structure import decoder_of, unwrap_model
from sealign.spectral.projection import check_strength

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EditHandle:
    """An edit that is attached to a model.

    Attributes:
        edit: the edit.
        strength: how far it goes; may be set while attached, 0 switches it off bit for bit.
        enabled: whether it edits at all; may be set while attached.
        modules: dotted paths of the modules whose outputs it edits.
    """

    def __init__(self, edit: Edit, strength: float) -> None:
        self.edit = edit
        self.strength = strength
        self.enabled = True
        self.modules = edit.modules
        self._stack = ExitStack()

    def set_strength(self, strength: float | str) -> None:
        """Change the strength from the next call of the model on.

        Raises:
            SettingError: not a finite number.
        """
        try:
            value = float(strength)
        except ValueError:
            raise SettingError(f"strength is '{strength}', but it must be a number; try 0.5") from None
        check_strength(value)
        self.strength = value

    def switch(self, enabled: bool) -> None:
        """Switch the edit on or off."""
        self.enabled = enabled

    @contextmanager
    def switched(self, enabled: bool) -> Iterator[None]:
        """Switch the edit on or off inside a ``with`` block."""
        before, self.enabled = self.enabled, enabled
        try:
            yield
        finally:
            self.enabled = before

    def detach(self) -> None:
        """Take the edit off; the model is then, bit for bit, what it was. A second call does nothing."""
        # A graph that was compiled while the edit was on does not look at hooks again, but at this it does.
        self.enabled = False
        self._stack.close()


class _EditHook:
    """The forward hook of one layer."""

    def __init__(self, handle: EditHandle, layer_edit: LayerEdit) -> None:
        self._handle = handle
        self._layer_edit = layer_edit

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        handle = self._handle
        if not handle.enabled or handle.strength == 0:
            return None
        if isinstance(output, tuple):
            return (self._layer_edit(output[0], handle.strength), *output[1:])
        return self._layer_edit(output, handle.strength)


def attach(
    model: PreTrainedModel | nn.Module,
    edit: Edit,
    *,
    strength: float | None = None,
    ignore_mismatch: bool = False,
) -> EditHandle:
    """Edit a model's activations from now on, until the handle is detached.

    The output of each of the edit's modules is replaced by its edit. Several edits compose in the
    order in which they were attached: at a common module, a later one edits what an earlier one gave.

    Args:
        model: the model the edit was fitted on; may be wrapped by PEFT or spread over devices.
        edit: the edit.
        strength: in place of the edit's own.
        ignore_mismatch: apply to a model with another fingerprint.

    Raises:
        FingerprintError: the model is not the one that the edit was fitted on, or lacks a module of it.
        ModelError: the model was compiled before; attach first and compile afterwards.
        SettingError: the strength is not finite.

    Example:
        >>> import sealign
        >>> model, tokenizer = sealign.load_model("smollm2")
        >>> demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=8)
        >>> config = sealign.FitConfig(layers="last:1")
        >>> handle = attach(model, sealign.fit_edit(model, tokenizer, demonstrations, config=config))
        >>> handle.modules
        ['model.layers.29.mlp']
        >>> handle.detach()
    """
    if strength is not None:
        edit = edit.with_settings(strength=strength)
    _refuse_compiled(model)
    if not ignore_mismatch:
        check_fingerprint(model, edit.record.model.fingerprint, edit.record.model.id)
    base = unwrap_model(model)
    handle = EditHandle(edit, edit.settings.strength)
    with ExitStack() as stack:
        if edit.settings.normalization == "feature":
            # Both are entry points: some models call their inner decoder past the outer one.
            for entry in (base, decoder_of(model)):
                hook = entry.register_forward_pre_hook(_check_feature_call(handle), with_kwargs=True)
                stack.callback(hook.remove)
        for layer in edit.layers:
            path = edit.record.layers[str(layer)].module
            try:
                module = base.get_submodule(path)
            except AttributeError:
                raise FingerprintError(
                    f"the edit's module '{path}' is not in {type(base).__name__}; load '{edit.record.model.id}'"
                ) from None
            layer_edit = LayerEdit(edit.projections[layer], edit.settings)
            _place(layer_edit, module)
            stack.callback(module.register_forward_hook(_EditHook(handle, layer_edit)).remove)
        handle._stack = stack.pop_all()
    return handle


@contextmanager
def apply_edit(
    model: PreTrainedModel | nn.Module,
    edit: Edit,
    *,
    strength: float | None = None,
    ignore_mismatch: bool = False,
) -> Iterator[EditHandle]:
    """Edit a model's activations inside a ``with`` block; afterwards the model is bit for bit as before.

    Blocks nest, and compose as ``attach`` says; an exception inside leaves nothing behind.

    Args:
        model, edit, strength, ignore_mismatch: as for ``attach``.

    Raises:
        FingerprintError, ModelError, SettingError: as ``attach``.
    """
    handle = attach(model, edit, strength=strength, ignore_mismatch=ignore_mismatch)
    try:
        yield handle
    finally:
        handle.detach()


def _place(layer_edit: LayerEdit, module: nn.Module) -> None:
    """Put the factors where the module is, so that neither its first call nor a graph of it has to."""
    parameter = next(module.parameters(), None)
    if parameter is not None and parameter.device.type != "meta" and parameter.is_floating_point():
        layer_edit.place(parameter.device, parameter.dtype)


def _refuse_compiled(model: nn.Module) -> None:
    """A compiled graph does not see hooks that come later: the edit would silently do nothing."""
    for path, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ModelError(
                f"the model is compiled{f' at {path}' if path else ''}, and a compiled graph does not see an edit that "
                "is attached later; attach the edit first, then compile"
            )


def _check_feature_call(handle: EditHandle) -> Any:
    """A pre-hook that refuses what per-feature rescaling is not defined for."""

    def check(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not handle.enabled or handle.strength == 0:
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

    return check
