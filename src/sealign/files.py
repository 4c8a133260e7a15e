"""Files and folders that are written completely or not at all; tensors in safetensors files."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from sealign.errors import EditFileError


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that is renamed to ``path`` when the block ends without an error.

    Args:
        path: File to write; an existing file is replaced.

    Raises:
        OSError: The disk is full or the folder is not writable; no partial file remains.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file completely or not at all; see ``new_file``."""
    with new_file(path) as temporary:
        temporary.write_bytes(data)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file, completely or not at all.

    Args:
        path: File to write; an existing file is replaced.
        tensors: Tensors on any device, by name.

    Raises:
        OSError: The disk is full or the folder is not writable; no partial file remains.
    """
    from safetensors.torch import save

    write_bytes(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


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


def check_folder(folder: Path, *, replaces: str | None = None) -> None:
    """Raise the error that ``new_folder`` would raise, before a long computation.

    Args:
        folder, replaces: As for ``new_folder``.

    Raises:
        EditFileError: The folder is a file, or is not empty and must not be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise EditFileError(f"'{folder}' is a file, but the output is a folder; choose another name")
    if folder.is_dir() and any(folder.iterdir()) and not (replaces and (folder / replaces).is_file()):
        raise EditFileError(
            f"'{folder}' exists and was not written by Sealign, so it is not replaced; choose a new or an empty folder"
        )


@contextmanager
def new_folder(folder: Path, *, replaces: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder`` that is renamed to it when the block ends without an error.

    Args:
        folder: Folder to create, with its parents.
        replaces: Name of a file that marks a folder as written by Sealign. An existing folder with this file is
            replaced; files in it that the new folder does not have are kept.

    Raises:
        EditFileError: The folder is a file, or is not empty and must not be replaced.
    """
    check_folder(folder, replaces=replaces)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        if folder.is_dir():
            old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
            folder.replace(old / folder.name)
            temporary.replace(folder)
            # Keep other files, such as the user's notes or the history of a Git clone.
            for entry in (old / folder.name).iterdir():
                if not (folder / entry.name).exists():
                    entry.rename(folder / entry.name)
            shutil.rmtree(old)
        else:
            temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def locate_folder(folder_or_repo_id: str | Path, *, revision: str | None = None) -> Path:
    """Return the local folder of an edit, which is downloaded if it is a repository on the Hub.

    Args:
        folder_or_repo_id: Local folder, or id of a repository as ``owner/name``.
        revision: Branch, tag or commit on the Hub.

    Raises:
        EditFileError: There is no such folder, or the repository cannot be downloaded.
    """
    path = Path(folder_or_repo_id)
    if path.is_dir():
        return path
    text = str(folder_or_repo_id)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise EditFileError(f"there is no folder '{text}'; check the path, or give a repository as owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=["edit.*", "README.md"]))
    except Exception as error:  # the Hub client raises many unrelated types
        raise EditFileError(
            f"'{text}' is neither a folder nor a repository that can be downloaded from the Hub "
            f"({type(error).__name__}); check the name and the network"
        ) from error


def cache_dir() -> Path:
    """Return the folder for converted models and unfinished work: ``SEALIGN_CACHE``, or the user's cache folder."""
    from platformdirs import user_cache_path

    configured = os.environ.get("SEALIGN_CACHE")
    return Path(configured) if configured else user_cache_path("sealign", appauthor=False)
