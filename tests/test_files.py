from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from sealign.errors import EditFileError
from sealign.files import (
    locate_folder,
    new_folder,
    read_tensors,
    tensors_hash,
    write_tensors,
)


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

    monkeypatch.setattr(os, "fsync", full)
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


def test_folders_of_others_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with (
        pytest.raises(EditFileError, match="was not written by Sealign, so it is not replaced"),
        new_folder(tmp_path / "thesis", replaces="mark"),
    ):
        pass
    with pytest.raises(EditFileError, match="is a file"), new_folder(tmp_path / "thesis" / "chapter.tex"):
        pass
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "x"


def test_locate_folder(tmp_path: Path) -> None:
    assert locate_folder(tmp_path) == tmp_path
    with pytest.raises(EditFileError, match="there is no folder 'nowhere'"):
        locate_folder("nowhere")
    with pytest.raises(EditFileError, match="neither a folder nor a repository that can be downloaded"):
        locate_folder("nobody/nothing-at-all")
