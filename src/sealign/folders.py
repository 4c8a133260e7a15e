"""Folders that appear complete or not at all, and replace only what Sealign wrote and the user gives up."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sealign.errors import EditFileError

MARK_NAME = "sealign.json"
"""Name of the file that marks a folder as written by Sealign and lists the files that were written."""


def temporary_path(path: Path) -> Path:
    """Return a hidden path beside ``path`` that nothing else uses.

    Args:
        path: Path that the temporary one will be renamed to.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def check_parent(path: Path) -> None:
    """Raise an error unless a file or folder can be created at a path, with its parents.

    Args:
        path: Path of the output.

    Raises:
        EditFileError: A parent is a file, or the folder cannot be written to.
    """
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise EditFileError(f"'{parent}' is a file, but '{path}' needs a folder there; choose another output")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise EditFileError(
            f"the folder '{parent}' is not writable, so '{path}' cannot be written; choose another output"
        )


def check_folder(
    folder: Path, *, mark: str = MARK_NAME, overwrite: bool = False, sources: Sequence[str | Path] = ()
) -> bool:
    """Raise the error that ``new_folder`` would raise, before a long computation.

    Args:
        folder, mark, overwrite, sources: As for ``new_folder``.

    Returns:
        Whether an earlier folder will be replaced.

    Raises:
        EditFileError: As for ``new_folder``.
    """
    restore_folder(folder)
    check_parent(folder)
    if any(_is_same(folder, Path(source)) for source in sources):
        raise EditFileError(f"'{folder}' is the folder that is read from, so it is not replaced; choose another output")
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise EditFileError(f"'{folder}' is a file, but the output is a folder; choose another name")
    if not any(folder.iterdir()):
        return False
    if _read_mark(folder, mark) is None:
        raise EditFileError(
            f"'{folder}' is not empty and has no {mark} written by Sealign, so it is not replaced; choose a new or an "
            "empty folder"
        )
    if not overwrite:
        raise EditFileError(
            f"'{folder}' exists already, and is replaced only with --overwrite (overwrite=True in Python); add it, or "
            "choose another output"
        )
    return True


@contextmanager
def new_folder(
    folder: Path, *, mark: str = MARK_NAME, overwrite: bool = False, sources: Sequence[str | Path] = ()
) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder`` that takes its place in one step when the block ends without an error.

    Whenever the process is interrupted or killed, the folder is the earlier one or the new one, complete. Where the
    system cannot exchange two folders in one step, as on some network file systems, a killed process may leave the
    earlier one under the name ``.NAME.replaced``; it is renamed back when Sealign next opens the folder.

    Args:
        folder: Folder to create, with its parents. A symbolic link is followed.
        mark: Name of the JSON file that marks a folder as written by Sealign. The default one is written here; another
            must be written in the block, with a key ``format`` that begins with ``sealign.``.
        overwrite: Whether to replace a folder that is marked. Of its files, those that Sealign wrote are removed and
            all others, such as notes or the history of a Git clone, are kept.
        sources: Folders that are read from, which are never replaced.

    Raises:
        EditFileError: The folder is a file, cannot be written, is one of the sources, is not empty and not marked, or
            is marked and ``overwrite`` is False.
    """
    check_folder(folder, mark=mark, overwrite=overwrite, sources=sources)
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(folder)
    try:
        temporary.mkdir()
        yield temporary
        if mark == MARK_NAME:
            _write_mark(temporary)
        if folder.is_dir():
            _keep_others(folder, temporary, mark)
        _put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # the new folder after an error, otherwise the earlier one


def restore_folder(folder: Path) -> None:
    """Rename the earlier folder back if a process was stopped before the new one took its place.

    Args:
        folder: Folder that ``new_folder`` may have been replacing.
    """
    folder = folder.resolve()
    if not folder.exists() and _replaced(folder).is_dir():
        _replaced(folder).replace(folder)


def check_unmarked(folder: Path, names: Sequence[str], *, mark: str) -> None:
    """Raise an error if a folder has outputs of a run but not the file that the run writes first.

    Args:
        folder: Output folder of a run that continues in the same folder after an interruption.
        names: Names of the files and folders that the run replaces.
        mark: Name of the file that shows that the run wrote them.

    Raises:
        EditFileError: The folder is a file, cannot be written, or has one of the names without the mark.
    """
    check_parent(folder / mark)
    found = [name for name in names if (folder / name).exists()]
    if found and not (folder / mark).is_file():
        raise EditFileError(
            f"'{folder / found[0]}' was not written by Sealign, so it is not replaced; choose a new or an empty folder"
        )


def _is_same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _read_mark(folder: Path, mark: str) -> dict[str, Any] | None:
    """Return the contents of the mark, or None if the folder has none."""
    try:
        found = json.loads((folder / mark).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    ours = isinstance(found, dict) and str(found.get("format")).startswith("sealign.")
    return found if ours else None


def _write_mark(folder: Path) -> None:
    names = sorted([*(entry.name for entry in folder.iterdir()), MARK_NAME])
    mark = {"format": "sealign.folder", "format_version": 1, "files": names}
    (folder / MARK_NAME).write_text(json.dumps(mark, indent=2) + "\n", encoding="utf-8")


def _keep_others(earlier: Path, new: Path, mark: str) -> None:
    """Copy what Sealign did not write from the earlier folder to the new one, and its permissions."""
    ours = {entry.name for entry in new.iterdir()} | set((_read_mark(earlier, mark) or {}).get("files", ()))
    for entry in earlier.iterdir():
        if entry.name in ours:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, new / entry.name, follow_symlinks=False)
    shutil.copymode(earlier, new)


def _put_in_place(new: Path, folder: Path) -> None:
    """Rename a new folder to its final name; an earlier folder takes the name of the new one, or is removed."""
    if not folder.exists() or not any(folder.iterdir()):
        new.replace(folder)
        return
    if _exchange(new, folder):
        return
    earlier = _replaced(folder)
    shutil.rmtree(earlier, ignore_errors=True)
    try:
        folder.replace(earlier)
        new.replace(folder)
    finally:
        restore_folder(folder)
    shutil.rmtree(earlier, ignore_errors=True)


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; return False where the system cannot."""
    if sys.platform not in ("linux", "darwin"):
        return False
    library, paths = ctypes.CDLL(None, use_errno=True), (os.fsencode(one), os.fsencode(other))
    here, exchange = -100, 2  # AT_FDCWD, and RENAME_EXCHANGE of Linux or RENAME_SWAP of macOS
    if sys.platform == "darwin":
        failed = library.renamex_np(*paths, exchange)
    elif hasattr(library, "renameat2"):
        failed = library.renameat2(here, paths[0], here, paths[1], exchange)
    else:
        return False
    code = ctypes.get_errno()
    if failed and code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
        raise OSError(code, os.strerror(code), str(other))
    return not failed
