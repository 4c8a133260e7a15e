"""Folders that are replaced: what is refused, what is kept, and what a fault at any moment leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sealign import folders
from sealign.errors import EditFileError
from sealign.folders import MARK_NAME, check_folder, check_unmarked, new_folder

FAULTS = '''
import os, shutil, sys
from pathlib import Path
from sealign import folders
from sealign.folders import MARK_NAME, new_folder, restore_folder

root, kind, swaps = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "exchange"
if not swaps:
    folders._exchange = lambda one, other: False
left = None
os.fsync = lambda _: None  # slow, and not a moment of its own

class Fault(BaseException):
    pass

def before_call(event, _):
    global left
    if left is None or not event.startswith(("open", "os.", "shutil.", "ctypes.")):
        return
    left -= 1
    if left == 0:
        if kind == "kill":
            os._exit(0)
        raise Fault

sys.addaudithook(before_call)

def write(version, *names):
    with new_folder(root / "out", overwrite=True) as temporary:
        (temporary / "weights").write_text(version)
        for name in names:
            (temporary / name).write_text(version)

def attempt(stop):
    """Replace the folder, and fail before a call of the given number; return whether there was no such call."""
    global left
    left = stop
    try:
        write("new", "added")
    except Fault:
        return False
    finally:
        done, left = left > 0, None
    return done

def contents():
    return {entry.name: entry.read_text() for entry in (root / "out").iterdir() if entry.name != MARK_NAME}

notes = {"notes": "mine"}
old, new = {"weights": "old", "removed": "old"} | notes, {"weights": "new", "added": "new"} | notes
seen, stop = set(), 0
while True:
    stop += 1
    for entry in root.iterdir():
        shutil.rmtree(entry)
    write("old", "removed")
    (root / "out" / "notes").write_text("mine")
    if kind == "kill":
        child = os.fork()
        if child == 0:
            os._exit(7 if attempt(stop) else 0)
        finished = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    else:
        finished = attempt(stop)
    if not swaps and kind == "kill":
        restore_folder(root / "out")  # as the next command does
    assert contents() in (old, new), (stop, contents())
    seen.add(contents()["weights"])
    if finished:
        break
    write("later")  # what is left behind is in nobody's way
assert seen == {"old", "new"} and contents() == new, seen
print(stop)
'''


@pytest.mark.parametrize("swap", ["exchange", "rename"])
@pytest.mark.parametrize("kind", ["raise", "kill"])
def test_a_fault_at_any_moment_leaves_the_old_or_the_new_folder(tmp_path: Path, kind: str, swap: str) -> None:
    """Faults are injected before every call of the operating system that Python audits."""
    if swap == "exchange" and not _can_exchange(tmp_path / "probe"):
        pytest.skip("this file system cannot exchange two folders")
    root = tmp_path / "root"
    root.mkdir()
    arguments = [sys.executable, "-c", FAULTS, str(root), kind, swap]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 30


def _can_exchange(folder: Path) -> bool:
    for name in ("one", "other"):
        (folder / name).mkdir(parents=True)
    return folders._exchange(folder / "one", folder / "other")


def _write(folder: Path, text: str, *, overwrite: bool = False) -> None:
    with new_folder(folder, overwrite=overwrite) as temporary:
        (temporary / "a").write_text(text)


def test_a_folder_appears_complete_with_its_mark(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError, match="stop"), new_folder(target) as temporary:
        (temporary / "half").write_text("x")
        raise RuntimeError("stop")
    assert os.listdir(tmp_path / "deep") == []
    _write(target, "1")
    assert json.loads((target / MARK_NAME).read_text())["files"] == ["a", MARK_NAME]
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_an_earlier_folder_is_replaced_only_if_asked(tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert not check_folder(target)
    _write(target, "1")
    with pytest.raises(EditFileError, match=r"exists already, and is replaced only with --overwrite \(overwrite=True"):
        _write(target, "2")
    assert (target / "a").read_text() == "1"
    assert check_folder(target, overwrite=True)
    _write(target, "2", overwrite=True)
    assert (target / "a").read_text() == "2"


def test_what_sealign_wrote_is_removed_and_the_rest_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with new_folder(target) as temporary:
        for name in ("a", "deviation.json"):
            (temporary / name).write_text("1")
    (target / ".git").mkdir()
    (target / ".git" / "HEAD").write_text("main")
    (target / "link").symlink_to("nowhere")
    target.chmod(0o710)
    _write(target, "2", overwrite=True)
    assert sorted(entry.name for entry in target.iterdir()) == [".git", "a", "link", MARK_NAME]
    assert (target / ".git" / "HEAD").read_text() == "main"
    assert (target / "link").readlink() == Path("nowhere")
    assert target.stat().st_mode & 0o777 == 0o710
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("mark", ["", "[]", '{"model_type": "llama"}', '{"format": null}', "\xff", "[" * 5000])
def test_folders_of_others_are_never_replaced(tmp_path: Path, mark: str) -> None:
    """A file with the name of the mark is not enough."""
    (tmp_path / MARK_NAME).write_text(mark, encoding="latin-1")
    with pytest.raises(EditFileError, match=f"is not empty and has no {MARK_NAME} written by Sealign"):
        _write(tmp_path, "1", overwrite=True)
    assert os.listdir(tmp_path) == [MARK_NAME]


@pytest.mark.parametrize("path", ["base", "link", "base/../base", "nested/up"])
def test_what_is_read_from_is_never_replaced(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "base", "weights")  # even if Sealign wrote it
    (tmp_path / "link").symlink_to("base")
    (tmp_path / "nested").mkdir()
    (tmp_path / "nested" / "up").symlink_to("../link")
    for target, source in ((path, tmp_path / "base"), (tmp_path / "base", path)):
        with pytest.raises(EditFileError, match="is the folder that is read from"):
            check_folder(Path(target), overwrite=True, sources=["elsewhere", source])
    assert (tmp_path / "base" / "a").read_text() == "weights"


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    _write(tmp_path / "real", "1")
    (tmp_path / "link").symlink_to("real")
    _write(tmp_path / "link", "2", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_text() == "2"


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(EditFileError, match="is a file, but the output is a folder"):
        check_folder(tmp_path / "file")
    with pytest.raises(EditFileError, match=r"file' is a file, but '.*/file/a/b' needs a folder there"):
        check_folder(tmp_path / "file" / "a" / "b")


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # the superuser may write everywhere
    with pytest.raises(EditFileError, match=r"is not writable, so '.*/new/out' cannot be written"):
        check_folder(tmp_path / "new" / "out")


def test_outputs_of_a_run_need_its_mark(tmp_path: Path) -> None:
    check_unmarked(tmp_path / "new", ["report.html"], mark="results.json")
    (tmp_path / "notes").write_text("mine")
    check_unmarked(tmp_path, ["report.html"], mark="results.json")
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(EditFileError, match=r"report.html' was not written by Sealign, so it is not replaced"):
        check_unmarked(tmp_path, ["table.csv", "report.html"], mark="results.json")
    (tmp_path / "results.json").write_text("{}")
    check_unmarked(tmp_path, ["table.csv", "report.html"], mark="results.json")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_decides_who_may_read(tmp_path: Path, mask: int, umask: Any) -> None:
    umask(mask)
    _write(tmp_path / "out", "1")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask
    assert (tmp_path / "out" / MARK_NAME).stat().st_mode & 0o777 == 0o666 & ~mask
