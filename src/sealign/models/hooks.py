"""Record what modules put out while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from sealign.models.sites import ResolvedSite


class Recorder:
    """Hooks that reduce each site's output as it comes, so that no whole output is kept.

    Args:
        sites: where to read.
        reduce: called with an output and its layer; returns what to keep.

    Attributes:
        recorded: layer -> what was kept of the latest output.
    """

    def __init__(self, sites: Sequence[ResolvedSite], reduce: Callable[[Tensor, int], Tensor]) -> None:
        self._sites = sites
        self._reduce = reduce
        self._stack = ExitStack()
        self.recorded: dict[int, Tensor] = {}

    def __enter__(self) -> Recorder:
        with ExitStack() as stack:
            for resolved in self._sites:
                handle = resolved.module.register_forward_hook(self._hook(resolved.layer, resolved.reads == "input"))
                stack.callback(handle.remove)
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
