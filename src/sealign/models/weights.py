"""Hashes of a model's weights: exact, for checkpoints, and up to precision, to know a model again."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sealign.models.checkpoint_tensors import CheckpointTensors
from sealign.models.structure import unwrap_model

_WORDS = 1 << 20
"""Number of 32-bit words that are summed together."""

_EXACT = ("float32", "float64", "bfloat16")
"""Data types in which the weights of one checkpoint round to the same bfloat16 numbers."""

_hashes: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()


def weights_digest(model: nn.Module) -> bytes:
    """Return a SHA-256 digest of every bit of every weight, with names, types and shapes.

    Weights that are offloaded are loaded module by module. A skeleton without weights has a digest, too.
    """
    digest = hashlib.sha256()
    for name, weight in _weights(unwrap_model(model)):
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(_content(weight))
    return digest.digest()


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 of all weights rounded to bfloat16, by which a checkpoint is known in float32 and in bfloat16.

    Adapters are left out, as are weights that are equal to earlier ones, because they are tied. The hash is kept until
    a weight is changed.
    """
    base = unwrap_model(model)
    state = _state(base)
    known = _hashes.get(base)
    if known is None or known[0] != state:
        digest, seen = hashlib.sha256(), set()
        for name, weight in _weights(base):
            content = _content(weight.bfloat16() if weight.is_floating_point() else weight)
            if "lora_" not in name and content not in seen:
                digest.update(name.replace(".base_layer.", ".").encode() + content)
                seen.add(content)
        known = _hashes[base] = state, digest.hexdigest()
    return known[1]


def stored_weights(model: nn.Module, checkpoint: CheckpointTensors) -> tuple[str, str] | None:
    """Return the ``weights_hash`` and the ``weights_type`` that a model has when it is loaded from a checkpoint.

    All tensors are read, one at a time, unless the files of the checkpoint are downloaded when they are read.

    Args:
        model: The model, which may be on the meta device.
        checkpoint: Its tensors.

    Returns:
        None if files are downloaded, or if weights are made from several stored tensors or are stored as integers, so
        that the model must be loaded.
    """
    if any(stored.fetch is not None for stored in checkpoint.tensors.values()):
        return None
    digest, seen, types = hashlib.sha256(), set(), set()
    for name, _ in unwrap_model(model).named_parameters():  # without those that are tied to earlier ones
        if name not in checkpoint.tensors:
            return None
        weight = checkpoint.tensors[name].read()
        if not weight.is_floating_point():
            return None
        types.add(str(weight.dtype).removeprefix("torch."))
        content = _content(weight.bfloat16())
        if content not in seen:
            digest.update(name.encode() + content)
            seen.add(content)
    return digest.hexdigest(), min(types)


def weights_type(model: nn.Module) -> str:
    """Return the data type of a model's weights, such as ``bfloat16``, or ``quantized``."""
    types = {part.dtype for weight in unwrap_model(model).parameters() for _, part in _parts("", weight)}
    if any(not dtype.is_floating_point for dtype in types):
        return "quantized"
    return min((str(dtype).removeprefix("torch.") for dtype in types), default="float32")


def has_weights(model: nn.Module) -> bool:
    """Return whether a model has weights, in memory or offloaded; a skeleton has none."""
    modules = unwrap_model(model).modules()
    return all(
        hasattr(module, "_hf_hook") or not any(weight.is_meta for weight in module.parameters(recurse=False))
        for module in modules
    )


def are_comparable(one: str, other: str) -> bool:
    """Return whether the weights of one checkpoint have the same ``weights_hash`` in two data types.

    Args:
        one, other: Results of ``weights_type``.

    Example:
        >>> are_comparable("float32", "bfloat16"), are_comparable("float32", "float16")
        (True, False)
    """
    return one == other or {one, other} <= set(_EXACT)


def _weights(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight with its name; those of an offloaded module are on its device until the next one."""
    for path, module in base.named_modules():
        own = dict(module.named_parameters(recurse=False))
        with _loaded(module) if any(weight.is_meta for weight in own.values()) else nullcontext():
            for name in own:
                weight: Any = getattr(module, name)
                # A worker of a model that is split over several has a share of the weight.
                share = weight.to_local() if hasattr(weight, "to_local") else weight
                for part_name, part in _parts(f"{path}.{name}".lstrip("."), share):
                    yield part_name, part.detach()


def _parts(name: str, weight: Any) -> list[tuple[str, Tensor]]:
    """Return the tensors that hold a weight: itself, or those inside a tensor of a quantised type, as torchao's are."""
    if hasattr(weight, "to_local") or not is_traceable_wrapper_subclass(weight):
        whole: Any = weight
        return [(name, whole)]
    inner, _ = weight.__tensor_flatten__()
    return [part for attribute in inner for part in _parts(f"{name}.{attribute}", getattr(weight, attribute))]


def _loaded(module: nn.Module) -> Any:
    from accelerate.utils import align_module_device

    return align_module_device(module)


@functools.cache
def _factors() -> Tensor:
    """Return a fixed random 64-bit factor for each word of a block."""
    drawn = hashlib.shake_128(b"sealign").digest(8 * _WORDS)
    return torch.from_numpy(np.frombuffer(drawn, "<i8").copy())


def _content(weight: Tensor) -> bytes:
    """Return the sums modulo 2^64 of 32-bit words times random factors, for each block of a weight.

    Two tensors that differ have equal sums with a probability below 2^-32, unless somebody looks for such tensors. The
    sums are formed on the device of the weight, at about the speed of its memory.
    """
    if weight.is_meta or not weight.numel():
        return b""
    octets = weight.contiguous().reshape(-1).view(torch.uint8)
    words = nn.functional.pad(octets, (0, -len(octets) % 4)).view(torch.int32)
    factors = _factors().to(weight.device)
    sums = [(block.long() * factors[: len(block)]).sum() for block in torch.split(words, _WORDS)]
    return torch.stack(sums).cpu().numpy().tobytes()


def _state(base: nn.Module) -> Any:
    """Return values that change with the weights: counts of changes, and a sample for those that are not counted."""
    named = [(name, weight) for name, weight in base.named_parameters() if not hasattr(weight, "to_local")]
    weights = [part for name, weight in named for part in _parts(name, weight)]
    counts = [
        (name, id(weight), weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        for name, weight in weights
    ]
    groups: dict[Any, list[Tensor]] = {}
    for _, weight in weights:
        if not weight.is_meta and weight.numel():
            flat = weight.detach().reshape(-1)
            groups.setdefault((weight.device, weight.dtype), []).append(flat[:: max(1, len(flat) // 8)])
    samples = [torch.cat(parts).double().cpu().numpy().tobytes() for parts in groups.values()]
    return counts, samples
