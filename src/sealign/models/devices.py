"""Where a model is run, and in which type: names that a user gives, checked."""

from __future__ import annotations

import torch

from sealign.errors import ModelError, first_sentence, suggestion

SPLIT = "split"
"""A model over several devices, and over memory and disk where they are not enough."""

_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_DEVICES = ("auto", SPLIT, "cpu", "cuda", "mps", "xpu")


def choose_dtype(name: str) -> str | torch.dtype:
    """Return a type by its name; ``auto`` stays, and is the type that a model is stored in.

    Raises:
        ModelError: it is unknown.

    Example:
        >>> choose_dtype("bfloat16")
        torch.bfloat16
    """
    if name not in _DTYPES:
        raise ModelError(f"unknown dtype '{name}'{suggestion(name, _DTYPES)}; choose one of: {', '.join(_DTYPES)}")
    dtype: str | torch.dtype = "auto" if name == "auto" else getattr(torch, name)
    return dtype


def choose_device(name: str = "auto") -> torch.device:
    """Return a device by its name; ``auto`` is CUDA, then MPS, then the CPU.

    Raises:
        ModelError: it cannot be used here.

    Example:
        >>> choose_device("cpu").type
        'cpu'
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = name.partition(":")[0]
    try:
        device = torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = f" ({first_sentence(error)})" if kind in _DEVICES else suggestion(kind, _DEVICES)
        raise ModelError(f"device '{name}' cannot be used here{reason}; try cpu, or auto") from error
    if device.type == "meta":
        raise ModelError("device 'meta' cannot be used here (it holds no numbers); try cpu, or auto")
    return device
