"""Vectors that are added to a module's input or output while a method is on a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sealign.methods.method import Attached


def change_output(module: nn.Module, change: Callable[[Tensor], Tensor], attached: Attached) -> None:
    """Put a function on what a module puts out, (..., d) -> (..., d), while a method is enabled."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if not attached.enabled:
            return None
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    attached.stack.callback(module.register_forward_hook(hook).remove)


def change_input(module: nn.Module, change: Callable[[Tensor], Tensor], attached: Attached) -> None:
    """Put a function on what a module takes in, (..., d) -> (..., d), while a method is enabled."""

    def hook(_module: nn.Module, inputs: Any) -> Any:
        return (change(inputs[0]), *inputs[1:]) if attached.enabled else None

    attached.stack.callback(module.register_forward_pre_hook(hook).remove)


def adder(vector: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function that adds a vector, (d,), in the type and on the device of what it is added to."""
    placed: dict[Any, Tensor] = {}

    def add(hidden: Tensor) -> Tensor:
        where = (hidden.device, hidden.dtype)
        if where not in placed:
            placed[where] = vector.to(*where)
        return hidden + placed[where]

    return add
