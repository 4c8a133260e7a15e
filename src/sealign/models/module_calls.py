"""Calls of single modules on two tokens: as a model makes them, and with made-up values in place of absent ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sealign.models.eval_mode import eval_mode
from sealign.models.structure import input_device, unwrap_model


@torch.no_grad()
def run_two_tokens(model: nn.Module) -> None:
    """Run a model once on two tokens, for the sake of its hooks.

    Args:
        model: The model; may be on the meta device.
    """
    base: Any = unwrap_model(model)
    with ExitStack() as stack, eval_mode(base):
        # With a mask and positions given, the forward pass reads no values, which the meta device does not have.
        bare = all(parameter.is_meta for parameter in base.parameters()) and not hasattr(base, "hf_device_map")
        device = torch.device("meta") if bare else input_device(base)
        if bare:  # the default implementation of experts reads values, or needs a type that the model may not have
            stack.callback(base.set_experts_implementation, base.get_experts_implementation())
            base.set_experts_implementation("batched_mm")
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        mask = torch.zeros(1, 1, 2, 2, dtype=next(base.parameters()).dtype, device=device)
        positions = torch.tensor([[0, 1]], device=device)
        base(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)


@dataclass(frozen=True)
class ModuleCall:
    """The arguments of one call of a module, with a value for every tensor.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    def run(self, module: nn.Module) -> Tensor:
        """Return the output of a module, or the first of its outputs.

        Args:
            module: The module to call.
        """
        output = module(*self.args, **self.kwargs)
        tensor: Tensor = output[0] if isinstance(output, tuple) else output
        return tensor


def made_up_calls(model: nn.Module, paths: Sequence[str]) -> dict[str, ModuleCall]:
    """Return a call on two tokens for each of some modules of a model without weights.

    The arguments have the shapes that the model gives them, and values of about the size that a model's have.

    Args:
        model: A model on the meta device.
        paths: Dotted paths of the modules.
    """
    calls: dict[str, ModuleCall] = {}
    with ExitStack() as stack:
        for path in paths:

            def keep(_module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                values = torch.Generator().manual_seed(0)
                calls[path] = ModuleCall(made_up(args, values), made_up(kwargs, values))

            hook = model.get_submodule(path).register_forward_pre_hook(keep, with_kwargs=True)
            stack.callback(hook.remove)
        run_two_tokens(model)
    return calls


def made_up(value: Any, values: torch.Generator) -> Any:
    """Return an argument with made-up values, on the CPU, in place of tensors on the meta device.

    Args:
        value: A tensor, or lists, tuples and mappings of tensors and of anything else, which stays as it is.
        values: Source of the values.
    """
    if isinstance(value, Tensor):
        if value.is_floating_point():
            return torch.randn(value.shape, generator=values, dtype=value.dtype)
        filled = torch.zeros(value.shape, dtype=value.dtype)
        if value.dtype == torch.bool and value.dim() > 1 and value.shape[-1] == value.shape[-2]:
            # A mask, which hides or shows what is true; either way no token is left without one to attend to.
            filled.diagonal(dim1=-2, dim2=-1).fill_(True)
        return filled
    if isinstance(value, tuple | list):
        return type(value)([made_up(each, values) for each in value]) if type(value) in (tuple, list) else value
    if isinstance(value, Mapping):
        return {name: made_up(each, values) for name, each in value.items()}
    return value
