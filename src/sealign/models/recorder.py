"""Recorder: hooks that record the activations of sites while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from sealign.models.hooks import add_hook
from sealign.models.sites import ResolvedSite


class Recorder:
    """Context manager that records a reduction of the activations at each site.

    Activations are reduced in the hook, so that no complete activation outlives the forward pass.

    Args:
        sites: Modules whose output (or input) is recorded.
        reduce: Function of an activation tensor and its layer index that returns the tensor to record.

    Attributes:
        recorded: Result of ``reduce`` for the latest forward pass, by layer.
    """

    def __init__(self, sites: Sequence[ResolvedSite], reduce: Callable[[Tensor, int], Tensor]) -> None:
        self._sites = sites
        self._reduce = reduce
        self._stack = ExitStack()
        self.recorded: dict[int, Tensor] = {}

    def __enter__(self) -> Recorder:
        with ExitStack() as stack:
            for resolved in self._sites:
                stack.callback(add_hook(resolved.module, self._hook(resolved.layer, resolved.reads == "input")))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _hook(self, layer: int, of_input: bool) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, inputs: Any, output: Any) -> None:
            value = inputs if of_input else output
            tensor = value[0] if isinstance(value, tuple) else value
            self.recorded[layer] = self._reduce(tensor, layer)

        return hook
