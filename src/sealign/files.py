"""Files that are written completely or not at all; tensors in safetensors files."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from sealign.errors import EditFileError
from sealign.folders import check_parent, restore_folder, temporary_path
from sealign.hub import hub_access

EDIT_FILES = ("edit.json", "edit.safetensors", "README.md")
"""Names of the files of an edit: its record, its tensors and its card."""


def check_file(path: Path, *, overwrite: bool = False, sources: Sequence[str | Path] = ()) -> bool:
    """Raise an error if an output file must not be written, before a long computation.

    Args:
        path: File to write.
        overwrite: Whether an existing file may be replaced.
        sources: Files that are read from, which are never replaced.

    Returns:
        Whether an existing file will be replaced.

    Raises:
        EditFileError: The path is a folder, cannot be written, is one of the sources, or exists and ``overwrite`` is
            False.
    """
    check_parent(path)
    if path.is_dir():
        raise EditFileError(f"'{path}' is a folder, but the output is a file; try '{path / 'name'}'")
    if not path.exists():
        return False
    if any(Path(source).exists() and path.samefile(source) for source in sources):
        raise EditFileError(f"'{path}' is the file that is read from, so it is not replaced; choose another output")
    if not overwrite:
        raise EditFileError(
            f"'{path}' exists already, and is replaced only with --overwrite (overwrite=True in Python); add it, or "
            "choose another output"
        )
    return True


@contextmanager
def new_file(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a temporary file beside ``path`` that is renamed to ``path`` when the block ends without an error.

    Args:
        path: File to write, with its parents; an existing file is replaced and gives its permissions to the new one. A
            symbolic link is followed.
        private: Whether only the user may read a new file; otherwise the umask decides.

    Raises:
        OSError: The disk is full or the folder is not writable; no partial file remains.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600 if private else 0o666))
        if path.exists():
            shutil.copymode(path, temporary)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def hold_lock(path: Path, *, timeout: float = -1) -> Iterator[None]:
    """Hold a lock until the block ends; no other process or thread holds it at the same time.

    Args:
        path: File of the lock, in an existing folder; it exists only as long as the lock is held.
        timeout: Number of seconds to wait; without end if it is negative.

    Raises:
        filelock.Timeout: Another process or thread still holds the lock.
    """
    from filelock import FileLock

    with FileLock(path, timeout=timeout):
        try:
            yield
        finally:
            with suppress(OSError):  # where a file in use cannot be removed
                path.unlink()  # those who wait for it notice, and take a new one


def write_bytes(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write a file completely or not at all; see ``new_file``."""
    with new_file(path, private=private) as temporary:
        temporary.write_bytes(data)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, private: bool = False) -> None:
    """Write tensors to a safetensors file, completely or not at all.

    Args:
        path, private: As for ``new_file``.
        tensors: Tensors on any device, by name.

    Raises:
        OSError: The disk is full or the folder is not writable; no partial file remains.
    """
    from safetensors.torch import save

    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    write_bytes(path, data, private=private)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file onto the CPU.

    Raises:
        EditFileError: The file is missing, truncated or not in the safetensors format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not path.is_file():
        raise EditFileError(f"there is no file '{path}'; the folder is incomplete, copy or download it again")
    try:
        # The file is read rather than memory-mapped, so that the tensors stay valid when it is replaced.
        return load(path.read_bytes())
    except SafetensorError as error:
        raise EditFileError(f"'{path}' is truncated or corrupted ({error}); copy or download it again") from error


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and bytes of tensors, as 64 hexadecimal digits.

    Example:
        >>> import torch
        >>> tensors_hash({"a": torch.zeros(2)}) == tensors_hash({"a": torch.zeros(1, 2)})
        False
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def locate_folder(folder_or_repo_id: str | Path, *, revision: str | None = None) -> Path:
    """Return the local folder of an edit, which is downloaded if it is a repository on the Hub.

    Args:
        folder_or_repo_id: Local folder, or id of a repository as ``owner/name``.
        revision: Branch, tag or commit on the Hub.

    Raises:
        EditFileError: There is no such folder, or the repository cannot be downloaded.
    """
    path = Path(folder_or_repo_id)
    restore_folder(path)
    if path.is_dir():
        return path
    text = str(folder_or_repo_id)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise EditFileError(f"there is no folder '{text}'; check the path, or give a repository as owner/name")
    from huggingface_hub import snapshot_download

    try:
        with hub_access():
            return Path(snapshot_download(text, revision=revision, allow_patterns=list(EDIT_FILES)))
    except Exception as error:  # the Hub client raises many unrelated types
        raise EditFileError(
            f"'{text}' is neither a folder nor a repository that can be downloaded from the Hub "
            f"({type(error).__name__}); check the name and the network"
        ) from error
