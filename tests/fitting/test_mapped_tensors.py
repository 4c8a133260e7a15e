from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
import torch

from sealign.files import read_tensors
from sealign.fitting.mapped_tensors import map_tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mapped_tensors_are_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    with (tmp_path / "a.safetensors").open("w+b") as file:
        mapped = map_tensors(file, {"one": (2, 3), "other": (5,)}, dtype)
    assert not any(bool(tensor.any()) for tensor in mapped.values())
    mapped["one"][1] = torch.tensor([1.5, -2.0, 0.25], dtype=dtype)
    mapped["other"].add_(7)
    found = read_tensors(tmp_path / "a.safetensors")
    assert {name: tensor.dtype for name, tensor in found.items()} == {"one": dtype, "other": dtype}
    assert found["one"].tolist() == [[0, 0, 0], [1.5, -2.0, 0.25]]
    assert found["other"].tolist() == [7] * 5


def test_room_for_mapped_tensors_is_asked_for_first(tmp_path: Path) -> None:
    with tempfile.TemporaryFile(dir=tmp_path) as file:
        with pytest.raises(OSError, match="[Nn]o space.*a file of 4503599627370") as error:
            map_tensors(file, {"one": (2**40, 2**10)}, torch.float32)
        assert error.value.errno == errno.ENOSPC
        assert os.fstat(file.fileno()).st_size == 0
