from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import Timeout

from sealign.errors import EditFileError
from sealign.files import (
    check_file,
    hold_lock,
    locate_folder,
    read_tensors,
    tensors_hash,
    write_bytes,
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


def test_an_existing_file_is_replaced_only_if_asked(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.gguf"
    assert not check_file(path)
    write_bytes(path, b"1")
    with pytest.raises(EditFileError, match=r"a.gguf' exists already, and is replaced only with --overwrite"):
        check_file(path)
    assert check_file(path, overwrite=True)
    with pytest.raises(EditFileError, match="is a folder, but the output is a file"):
        check_file(path.parent, overwrite=True)
    with pytest.raises(EditFileError, match=r"a.gguf' is a file, but '.*/b' needs a folder there"):
        check_file(path / "b")


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with hold_lock(path):
        with pytest.raises(Timeout), hold_lock(path, timeout=0):
            pass
        assert path.exists()
    assert not path.exists()
    with pytest.raises(RuntimeError, match="stop"), hold_lock(path, timeout=0):
        raise RuntimeError("stop")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["base", "symbolic", "hard"])
def test_the_file_that_is_read_from_is_never_replaced(tmp_path: Path, name: str) -> None:
    base = tmp_path / "base"
    base.write_text("weights")
    (tmp_path / "symbolic").symlink_to("base")
    os.link(base, tmp_path / "hard")
    with pytest.raises(EditFileError, match="is the file that is read from"):
        check_file(tmp_path / name, overwrite=True, sources=[tmp_path / "none", base])


@pytest.mark.parametrize(("private", "mask", "mode"), [(False, 0o022, 0o644), (False, 0o027, 0o640), (True, 0, 0o600)])
def test_who_may_read_a_file(tmp_path: Path, private: bool, mask: int, mode: int, umask: Any) -> None:
    umask(mask)
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.zeros(3)}, private=private)
    assert path.stat().st_mode & 0o777 == mode
    path.chmod(0o604)
    write_tensors(path, {"a": torch.ones(3)}, private=private)  # what the user chose stays
    assert path.stat().st_mode & 0o777 == 0o604


def test_a_link_to_a_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("1")
    (tmp_path / "link").symlink_to("real")
    write_bytes(tmp_path / "link", b"2")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "2"
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_locate_folder(tmp_path: Path) -> None:
    assert locate_folder(tmp_path) == tmp_path
    (tmp_path / ".edit.replaced").mkdir()  # what a killed replacement leaves where folders cannot be exchanged
    assert locate_folder(tmp_path / "edit").is_dir()
    with pytest.raises(EditFileError, match="there is no folder 'nowhere'"):
        locate_folder("nowhere")
    with pytest.raises(EditFileError, match="neither a folder nor a repository that can be downloaded"):
        locate_folder("nobody/nothing-at-all")
