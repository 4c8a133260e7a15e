"""The check of an export against the hooks where the whole model is not in memory: one module at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sealign.edits.attach import edit_output
from sealign.edits.edit import Edit
from sealign.edits.handle import EditHandle
from sealign.errors import ExportError
from sealign.export.hook_check import TOLERANCE
from sealign.export.matrix_changes import LoraFactors, MatrixChange
from sealign.models.checkpoint_modules import loaded_module
from sealign.models.checkpoint_tensors import CheckpointTensors
from sealign.models.module_calls import ModuleCall, made_up_calls

_ROUNDING = 4.0
"""Accepted rounding of sums of products, in units of the relative precision."""


@torch.no_grad()
def check_lora(model: nn.Module, edit: Edit, factors: Sequence[LoraFactors], checkpoint: CheckpointTensors) -> None:
    """Raise an error unless a LoRA does to the outputs of the edited modules what the hooks do, on two tokens.

    Each module is run by itself, with its weights from the checkpoint in float32 or wider and with inputs of about the
    size that a model's have, so that only one module is in memory.

    Args:
        model: The base model on the meta device.
        edit: The edit; its rescaling, if any, is left out.
        factors: The update of the matrix behind each edited module, by ascending layer.
        checkpoint: Tensors of the base model, of which those of the edited modules are read.

    Raises:
        ExportError: The outputs differ, or the checkpoint lacks tensors of an edited module.
    """
    wide = _wide_copy(model)
    calls = made_up_calls(wide, edit.modules)
    for layer, path, factor in zip(edit.layers, edit.modules, factors, strict=True):
        with loaded_module(wide, path, checkpoint) as module:
            outputs = _Outputs(module, calls[path], edit, layer)
            a, b = (part.to(outputs.plain.dtype) for part in (factor.a, factor.b))

            def add(_module: nn.Module, inputs: Any, output: Any, a: Tensor = a, b: Tensor = b) -> Any:
                return output + inputs[0] @ a.T @ b.T

            with _hooked(wide.get_submodule(factor.matrix.path), add):
                found = calls[path].run(module)
        outputs.compare("the LoRA adapter", path, found, 0.0)


@torch.no_grad()
def check_merged(
    model: nn.Module,
    edit: Edit,
    changes: Sequence[MatrixChange],
    checkpoint: CheckpointTensors,
    merged_model: nn.Module,
    merged: CheckpointTensors,
) -> None:
    """Raise an error unless the edited modules of a merged checkpoint put out what the hooks do, on two tokens.

    The modules are run as for ``check_lora``. The weights of the merged checkpoint are rounded to the type that they
    are stored in, which is allowed for.

    Args:
        model: The base model on the meta device.
        edit: The edit; its rescaling, if any, is left out.
        changes: The change of the matrix behind each edited module, by ascending layer.
        checkpoint: Tensors of the base model.
        merged_model: The model of the merged checkpoint on the meta device, which may have more biases.
        merged: Tensors of the merged checkpoint.

    Raises:
        ExportError: The outputs differ, or a checkpoint lacks tensors of an edited module.
    """
    wide, wide_merged = _wide_copy(model), _wide_copy(merged_model)
    calls = made_up_calls(wide, edit.modules)
    for layer, path, change in zip(edit.layers, edit.modules, changes, strict=True):
        with loaded_module(wide, path, checkpoint) as module:
            outputs = _Outputs(module, calls[path], edit, layer)
        path_of_weight = f"{change.matrix.path}.weight"
        rounding = _Rounding(torch.finfo(merged.find(path_of_weight).read().dtype).eps, change.matrix.transposed)
        matrix = wide_merged.get_submodule(change.matrix.path)
        with loaded_module(wide_merged, path, merged) as module, _hooked(matrix, rounding):
            found = calls[path].run(module)
        outputs.compare("the merged checkpoint", path, found, rounding.norm)


class _Rounding:
    """Forward hook of a matrix that measures how far rounding of its weights can have moved its output.

    Args:
        precision: Relative precision of the type that the weights are stored in.
        transposed: Whether the weight has shape (in, out).

    Attributes:
        norm: Norm of the error of the output.
    """

    def __init__(self, precision: float, transposed: bool) -> None:
        self.norm = 0.0
        self._precision = precision
        self._transposed = transposed

    def __call__(self, matrix: Any, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        weight = matrix.weight if self._transposed else matrix.weight.T
        bias = getattr(matrix, "bias", None)
        # A weight is rounded by at most half of its share of this, and independently of the others.
        energy = inputs[0].square() @ weight.square() + (0.0 if bias is None else bias.square())
        self.norm = self._precision * float(energy.double().sum().sqrt())


class _Outputs:
    """What one module puts out with and without the edit.

    Args:
        module: The module, with its weights.
        call: Its call.
        edit: The edit.
        layer: Layer of the module.

    Attributes:
        plain: Output without the edit.
        expected: Output with the edit, by its hook.
    """

    def __init__(self, module: nn.Module, call: ModuleCall, edit: Edit, layer: int) -> None:
        self.plain = call.run(module)
        plain_edit = edit.with_normalization("none")
        handle = EditHandle(plain_edit)
        with handle.stack:
            edit_output(module, plain_edit.layer_edits[layer], handle)
            self.expected = call.run(module)
        affine, width = edit.affine_edits[layer], self.plain.shape[-1]
        tokens = self.plain.reshape(-1, width).double().abs()
        terms = tokens @ affine.right.double().abs().T @ affine.left.double().abs().T + abs(affine.scale) * tokens
        precision = torch.finfo(self.plain.dtype).eps
        self._noise = _ROUNDING * precision * float((tokens + abs(edit.strength) * terms).norm())

    def compare(self, what: str, path: str, found: Tensor, rounding: float) -> None:
        """Raise an error if the output of the export is not the one of the hook.

        Args:
            what: Name of the export.
            path: Path of the module.
            found: Output of the export.
            rounding: Norm of the error that the rounding of weights makes.
        """
        gap, effect = (
            float((one.double() - other.double()).norm())
            for one, other in ((found, self.expected), (self.expected, self.plain))
        )
        if not gap <= TOLERANCE * effect + self._noise + rounding:
            raise ExportError(
                f"{what} changes the output of '{path}' by {gap:.2g} from that of the hooks, of a change of "
                f"{effect:.2g}, on two tokens, so it is another edit and is not written; serve the edit with sealign "
                "serve"
            )


def _wide_copy(model: nn.Module) -> Any:
    """Return a copy of a model on the meta device whose weights are loaded in float32 or wider."""
    return copy.deepcopy(model).to(torch.promote_types(next(model.parameters()).dtype, torch.float32)).eval()


def _hooked(module: nn.Module, hook: Callable[..., Any]) -> ExitStack:
    """Return a context in which a module has a forward hook."""
    stack = ExitStack()
    stack.callback(module.register_forward_hook(hook).remove)
    return stack
