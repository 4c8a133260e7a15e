from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from sealign import files as storage
from sealign.errors import EditFileError
from sealign.files import locate_folder, map_tensors, new_folder, read_tensors, tensors_hash, write_tensors


def test_tensors_come_back_to_the_bit(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(4).double(), "c": torch.randn(2, 2).bfloat16()}
    write_tensors(tmp_path / "x.safetensors", tensors)
    back = read_tensors(tmp_path / "x.safetensors")
    assert set(back) == set(tensors)
    assert all(torch.equal(back[name], tensors[name]) and back[name].dtype == tensors[name].dtype for name in tensors)
    assert tensors_hash(back) == tensors_hash(tensors)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_hash_sees_names_types_shapes_and_bits() -> None:
    base = {"a": torch.arange(4.0)}
    others: list[dict[str, Any]] = [
        {"b": torch.arange(4.0)},
        {"a": torch.arange(4.0).double()},
        {"a": torch.arange(4.0).reshape(2, 2)},
        {"a": torch.tensor([0.0, 1, 2, 3.0000002])},
    ]
    assert len({tensors_hash(tensors) for tensors in [base, *others]}) == 5


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(3)})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("keep", [0, 3, 40])
def test_truncated_files_are_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.randn(30)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(EditFileError, match="truncated or corrupted"):
        read_tensors(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(EditFileError, match="there is no file"):
        read_tensors(tmp_path / "none.safetensors")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "edit"
    with pytest.raises(RuntimeError, match="stop"), new_folder(target) as temporary:
        (temporary / "half").write_text("x")
        raise RuntimeError("stop")
    assert os.listdir(tmp_path / "deep") == []
    with new_folder(target, replaces="mark") as temporary:
        (temporary / "mark").write_text("1")
    assert os.listdir(tmp_path / "deep") == ["edit"]
    (target / "notes.md").write_text("mine")
    with new_folder(target, replaces="mark") as temporary:
        assert (target / "mark").read_text() == "1"
        (temporary / "mark").write_text("2")
    assert (target / "mark").read_text() == "2"
    assert (target / "notes.md").read_text() == "mine"
    assert os.listdir(tmp_path / "deep") == ["edit"]


def test_what_is_not_ours_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(EditFileError, match="not ours to replace"), new_folder(tmp_path / "thesis", replaces="mark"):
        pass
    with pytest.raises(EditFileError, match="is a file"), new_folder(tmp_path / "thesis" / "chapter.tex"):
        pass
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "x"


def test_locate_folder(tmp_path: Path) -> None:
    assert locate_folder(tmp_path) == tmp_path
    with pytest.raises(EditFileError, match="there is no folder 'nowhere'"):
        locate_folder("nowhere")
    with pytest.raises(EditFileError, match="neither a folder nor a repository"):
        locate_folder("nobody/nothing-at-all")


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
