"""Memory-mapped tensors in a safetensors file, for activations and sums that are larger than memory."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy
import torch
from torch import Tensor


def map_tensors(file: BinaryIO, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Turn an empty file into a safetensors file of zeros and return its memory-mapped tensors.

    Values that are assigned to the tensors are written to the file by the operating system, so that the tensors may be
    larger than memory.

    Args:
        file: Empty file, open for reading and writing. It may be closed or unlinked while the tensors are in use.
        shapes: Shapes of the tensors, by name.
        dtype: ``torch.float32`` or ``torch.float64``.

    Raises:
        OSError: There is not enough space on the disk.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from sealign.files import read_tensors
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "rows.safetensors"
        ...     with path.open("w+b") as file:
        ...         map_tensors(file, {"a": (2, 3)}, torch.float32)["a"][1, 2] = 5.0
        ...     read_tensors(path)["a"].sum().item()
        5.0
    """
    code, kind = {torch.float32: ("F32", "<f4"), torch.float64: ("F64", "<f8")}[dtype]
    header: dict[str, Any] = {}
    starts: dict[str, int] = {}
    end = 0
    for name, shape in shapes.items():
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # in this format the data start at a multiple of 8
    first = 8 + len(text)
    room = os.fstatvfs(file.fileno())
    if room.f_bavail * room.f_frsize < first + end:  # otherwise a later write would kill the process
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"a file of {first + end} bytes")
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(first + end)
    file.flush()

    def map_tensor(name: str) -> Tensor:
        place = first + starts[name]
        return torch.from_numpy(numpy.memmap(file, numpy.dtype(kind), "r+", place, tuple(shapes[name])))

    return {name: map_tensor(name) for name in shapes}
