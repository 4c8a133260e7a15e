"""Shared layers: the layers below an edit, run once for each input and not again for each edit.

An edit at layer l leaves what the layers below compute as it is, so that runs of the same input with several edits, or
with several strengths of one, differ in the layers above alone.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sealign.errors import SiteError
from sealign.models.rounding import tolerance
from sealign.models.shared_prefix import Prefix, repeat_cache
from sealign.models.sites import ResolvedSite
from sealign.models.structure import decoder_layers, unwrap_model

KEPT_BYTES = 256 * 2**20
"""Largest size of the outputs that are kept; inputs beyond it run through all layers."""

_sharing: WeakKeyDictionary[nn.Module, SharedLayers] = WeakKeyDictionary()
"""What is kept of each model inside ``share_layers``."""

_proved: WeakKeyDictionary[nn.Module, dict[tuple[int, bool], bool]] = WeakKeyDictionary()
"""Whether runs above a depth, with or without a prefix, were equal to whole ones, by model."""


@contextmanager
def share_layers(model: nn.Module, edits: Sequence[Sequence[str]]) -> Iterator[None]:
    """Inside a ``with`` block, run the layers below all of some edits once for each input of ``run_shared``.

    A model of which later layers need more of earlier ones than the residual stream is found by comparison of the first
    run with a whole one, and runs whole. So does a compiled model.

    Args:
        model: The model.
        edits: Dotted paths of the modules of each edit that will be attached inside the block; those of an intervention
            that changes something else are empty, and nothing is shared then.

    Example:
        >>> import sealign
        >>> model, tokenizer = sealign.load_model("smollm2")
        >>> ids = tokenizer("The river", return_tensors="pt").input_ids
        >>> with share_layers(model, [["model.layers.14"]]):
        ...     first, second = (run_shared(model, input_ids=ids, use_cache=False).logits for _ in range(2))
        >>> bool((first == second).all())
        True
    """
    base = unwrap_model(model)
    shared = None if hasattr(model, "_orig_mod") else _shared_layers(base, edits)
    if shared is None:
        yield
        return
    outer = _sharing.get(base)
    if outer is not None and outer.depth <= shared.depth:
        yield  # what the outer block keeps serves this one, too
        return
    _sharing[base] = shared
    try:
        yield
    finally:
        if outer is None:
            del _sharing[base]
        else:
            _sharing[base] = outer


def run_shared(model: Any, *, prefix: Prefix | None = None, edited: bool = True, **inputs: Any) -> Any:
    """Run a model; inside ``share_layers``, without the layers that have run on the same input.

    Args:
        model: The model, with the edits that are attached to it. No gradient is computed.
        prefix: Prefix that the input continues; its cache is not changed.
        edited: Whether an edit may be attached; False if none is, so that all layers can be kept.
        **inputs: Arguments of the model: ``input_ids``, and others that are tensors or are the same in all runs.
    """
    shared = _sharing.get(unwrap_model(model))
    return _call(model, prefix, inputs) if shared is None else shared.run(model, prefix, edited, inputs)


@contextmanager
def without_layers_above(model: nn.Module, sites: Sequence[ResolvedSite]) -> Iterator[None]:
    """Inside a ``with`` block, do not run the layers above all of some sites, whose activations do not depend on them.

    Nothing that comes after these layers means anything inside the block.

    Args:
        model: The model.
        sites: Modules that are read; if one is in no decoder layer, all layers run.
    """
    base = unwrap_model(model)
    try:
        path, layers = decoder_layers(base)
    except SiteError:
        yield
        return
    inside = all(f"{site.path}.".startswith(f"{path}.{site.layer}.") for site in sites)
    if not inside or hasattr(model, "_orig_mod"):
        yield
        return
    highest = max(site.layer for site in sites)
    with _recorded(layers, {highest + 1}, lambda output: output) as outputs, ExitStack() as stack:
        for layer in layers[highest + 1 :]:
            stack.enter_context(_own_forward(layer, lambda *_args, **_kwargs: outputs[highest + 1]))
        yield


def _call(model: Any, prefix: Prefix | None, inputs: Mapping[str, Any]) -> Any:
    rows = len(inputs["input_ids"])
    cache = None
    if prefix is not None and prefix.cache is not None:
        cache = copy.deepcopy(prefix.cache) if rows == 1 else repeat_cache(prefix.cache, rows)
    given = {} if cache is None else {"past_key_values": cache}
    return model(**{"use_cache": cache is not None} | given | dict(inputs))


def _shared_layers(base: nn.Module, edits: Sequence[Sequence[str]]) -> SharedLayers | None:
    """Return the layers to share, or None if the layers of the model cannot be identified."""
    try:
        path, layers = decoder_layers(base)
    except SiteError:
        return None
    depths = [_depth(path, len(layers), module) for modules in edits for module in modules]
    return SharedLayers(layers, min(depths, default=0) if all(edits) else 0)


def _depth(path: str, count: int, module: str) -> int:
    """Return the number of layers that do not depend on the output of a module."""
    for index in range(count):
        if module == f"{path}.{index}":
            return index + 1  # what the layer computes before its output is edited
        if module.startswith(f"{path}.{index}."):
            return index
    return 0


class SharedLayers:
    """The outputs of lower layers for the inputs of a model so far.

    Args:
        layers: The decoder layers.
        depth: Number of layers below all edits.

    Attributes:
        depth: The same.
    """

    def __init__(self, layers: nn.ModuleList, depth: int) -> None:
        self._layers = layers
        self.depth: int = depth
        self._kept: dict[str, dict[int, Any]] = {}
        self._bytes = 0

    @torch.no_grad()
    def run(self, model: Any, prefix: Prefix | None, edited: bool, inputs: Mapping[str, Any]) -> Any:
        """Run the model as ``run_shared`` describes."""
        depth = self.depth if edited else len(self._layers)
        key = _key(prefix, inputs)
        known = self._kept.setdefault(key, {})
        if depth in known:
            return self._run_above(depth, known[depth], model, prefix, inputs)
        if depth == 0 or self._bytes > KEPT_BYTES:
            return _call(model, prefix, inputs)
        depths = {depth, self.depth} - {0}
        with _recorded(self._layers, depths, _copied) as outputs:
            result = _call(model, prefix, inputs)
        for each, output in outputs.items():
            if self._is_proved(each, output, model, prefix, inputs, result.logits):
                known[each] = output
                self._bytes += sum(tensor.nbytes for tensor in _tensors(output))
        return result

    def _run_above(self, depth: int, output: Any, model: Any, prefix: Prefix | None, inputs: Mapping[str, Any]) -> Any:
        with _replaced(self._layers[:depth], output):
            return _call(model, prefix, inputs)

    def _is_proved(
        self, depth: int, output: Any, model: Any, prefix: Prefix | None, inputs: Mapping[str, Any], expected: Tensor
    ) -> bool:
        """Return whether the layers above a depth give the same logits; compared once for each model and depth."""
        if output is None:
            return False
        known = _proved.setdefault(unwrap_model(model), {})
        kind = depth, prefix is not None and prefix.cache is not None
        if kind not in known:
            found = self._run_above(depth, output, model, prefix, inputs).logits
            limit = tolerance(expected.dtype)
            known[kind] = torch.allclose(found.float(), expected.float(), atol=limit, rtol=limit, equal_nan=True)
        return known[kind]


def _key(prefix: Prefix | None, inputs: Mapping[str, Any]) -> str:
    """Return the key of an input: a hash of its tensors and of the token ids of its prefix."""
    digest = hashlib.blake2b(repr([] if prefix is None else prefix.ids).encode(), digest_size=16)
    for name, value in sorted(inputs.items()):
        digest.update(f"{name}{type(value).__name__}".encode())
        tensors = _tensors(value)
        for tensor in tensors:
            digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        if not tensors:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors in a tensor, a tuple or a dictionary."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _copied(output: Any) -> Any:
    """Return a copy of the output of a layer, a tensor or a tuple of tensors and None; None if it is something else."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, tuple) and all(item is None or isinstance(item, Tensor) for item in output):
        return tuple(None if item is None else item.clone() for item in output)
    return None


@contextmanager
def _recorded(layers: nn.ModuleList, depths: set[int], keep: Callable[[Any], Any]) -> Iterator[dict[int, Any]]:
    """Keep what some layers put out before it is edited; yield a mapping from the number of layers to the output."""
    outputs: dict[int, Any] = {}

    def recording(depth: int, forward: Any) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            outputs[depth] = keep(output)
            return output

        return record

    with ExitStack() as stack:
        for depth in depths:
            layer = layers[depth - 1]
            stack.enter_context(_own_forward(layer, recording(depth, layer.forward)))
        yield outputs


@contextmanager
def _replaced(layers: nn.ModuleList, output: Any) -> Iterator[None]:
    """Let every layer put out what the last of them did, without running it."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_own_forward(layer, lambda *_args, **_kwargs: _copied(output)))
        yield


@contextmanager
def _own_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Give a module another ``forward`` inside a ``with`` block; its hooks stay as they are."""
    # Hooks would see an output that edits have changed, and could not keep a layer from running.
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
