"""Devices and number types that a model is loaded on and in, checked by name."""

from __future__ import annotations

import torch

from sealign.errors import ModelError, first_sentence, suggestion, unknown_name

SPLIT = "split"
"""Name for the distribution of a model over several devices and, if needed, memory and disk."""

_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_DEVICES = ("auto", SPLIT, "cpu", "cuda", "mps", "xpu")


def choose_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """Return the torch type of a name; ``auto``, the type that a model is stored in, is returned unchanged.

    Args:
        dtype: ``auto``, ``float32``, ``bfloat16``, ``float16`` or ``float64``, or one of these torch types.

    Raises:
        ModelError: The type is unknown or not a supported one.

    Example:
        >>> choose_dtype("bfloat16"), choose_dtype(torch.float32)
        (torch.bfloat16, torch.float32)
    """
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ModelError(unknown_name("dtype", name, _DTYPES))
    chosen: str | torch.dtype = "auto" if name == "auto" else getattr(torch, name)
    return chosen


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device of a name, after a check that it can be used.

    Args:
        device: ``auto`` (CUDA, else MPS, else CPU), a name that torch knows, such as ``cuda:1``, or a device.

    Raises:
        ModelError: The device is unknown or cannot be used on this machine.

    Example:
        >>> choose_device("cpu").type
        'cpu'
    """
    name = str(device)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = name.partition(":")[0]
    try:
        chosen = torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = f" ({first_sentence(error)})" if kind in _DEVICES else suggestion(kind, _DEVICES)
        raise ModelError(f"device '{name}' cannot be used here{reason}; try cpu, or auto") from error
    if chosen.type == "meta":
        raise ModelError("device 'meta' cannot be used here (it stores no values); try cpu, or auto")
    return chosen
