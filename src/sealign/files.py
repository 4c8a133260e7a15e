"""Files and folders that are written completely or not at all; strict reading of safetensors and JSON records."""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from sealign.errors import EditFileError, SealignError

Record = TypeVar("Record")


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


RECORD_CONFIG: Any = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
"""Value of ``__pydantic_config__`` in a dataclass that ``read_record`` reads, and in every dataclass inside it."""


def write_record(record: Any, *, indent: int | None = 2) -> str:
    r"""Return a record as JSON text that ``read_record`` reads, with a newline at the end.

    Args:
        record: A dataclass or a pydantic model.
        indent: Number of spaces per level; None writes one line.

    Raises:
        ValueError: A number is NaN or infinite.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Note:
        ...     text: str
        >>> write_record(Note("short"), indent=None)
        '{"text": "short"}\n'
    """
    from pydantic import TypeAdapter

    data = TypeAdapter(type(record)).dump_python(record, mode="json")
    return json.dumps(data, indent=indent, allow_nan=False) + "\n"


def read_record(
    path: Path,
    model_type: type[Record],
    *,
    format: str,
    format_version: int,
    error: type[SealignError] = EditFileError,
    remake: str = "fit it again with this version",
) -> Record:
    """Read a record file strictly: every field must be present, with its exact type, and nothing else.

    Args:
        path: A JSON file that holds one object with the keys ``format`` and ``format_version``.
        model_type: A dataclass whose ``__pydantic_config__`` is ``RECORD_CONFIG``, or a pydantic model with the same
            configuration. Fields with a default value must be in the file, too.
        format: Required value of the key ``format``, such as ``sealign.edit``.
        format_version: Required value of the key ``format_version``. Must be at least 1.
        error: Class of the error to raise.
        remake: Instruction for the user of a file of an older version.

    Raises:
        SealignError: An ``error`` of one sentence: the file is missing, is not JSON, has another format or version, or
            a key is missing, unknown, of the wrong type or not finite. The message names the file and the key.
    """
    from pydantic import TypeAdapter, ValidationError

    data, text = _read_json_object(path, error)
    if data.get("format") != format:
        raise error(
            f"'{path}' is not a {format} file: its 'format' is {reprlib.repr(data.get('format'))}; check the path"
        )
    version = data.get("format_version")
    if isinstance(version, int) and not isinstance(version, bool) and version != format_version:
        remedy = "upgrade sealign" if version > format_version else remake
        raise error(
            f"'{path}' has format version {version}, but this version of Sealign reads version {format_version}; "
            f"{remedy}"
        )
    adapter = TypeAdapter(model_type)
    problem = ""
    try:
        record = adapter.validate_json(text)
        if missing := _first_missing(adapter.dump_python(record, mode="json"), data):
            problem = f"has no key '{missing}'"
    except ValidationError as invalid:
        first = invalid.errors(include_url=False)[0]
        if first["type"] == "json_invalid":  # pydantic's limit of nesting is below that of the json module
            raise _not_json(path, "it is nested too deeply", error) from invalid
        problem = _first_problem(data, first)
    if not problem and (name := _first_infinite(data)):
        problem = f"has a number at key '{name}' that is not finite"
    if problem:
        raise error(f"'{path}' {problem}; it was changed by hand or by another program, copy or download it again")
    return record


def _read_json_object(path: Path, error: type[SealignError]) -> tuple[dict[str, Any], str]:
    if not path.is_file():
        raise error(f"there is no file '{path}'; check the path")
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
    except json.JSONDecodeError as invalid:
        raise _not_json(path, f"{invalid.msg} at line {invalid.lineno}", error) from invalid
    except UnicodeDecodeError as invalid:
        raise _not_json(path, f"it is not UTF-8 at byte {invalid.start}", error) from invalid
    except RecursionError as invalid:
        raise _not_json(path, "it is nested too deeply", error) from invalid
    if not isinstance(data, dict):
        raise error(f"'{path}' holds no JSON object; check the path")
    return data, text


def _not_json(path: Path, reason: str, error: type[SealignError]) -> SealignError:
    return error(f"'{path}' is not JSON ({reason}); it is truncated or corrupted, copy or download it again")


def _first_problem(data: Any, problem: Any) -> str:
    """Return what pydantic found first in a file, with the dotted path of the key."""
    keys, value = [], data
    for part in problem["loc"]:
        # Other parts, such as the member of a union, are no keys of the file.
        if isinstance(value, dict) and (part in value or problem["type"] == "missing"):
            keys.append(str(part))
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            keys.append(str(part))
            value = value[part]
    name = ".".join(keys)
    if problem["type"] == "missing":
        return f"has no key '{name}'"
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"has an unknown key '{name}'"
    reason = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"has {reprlib.repr(value)} at key '{name}', which must be {reason[0].lower()}{reason[1:]}"


def _first_missing(expected: Any, found: Any, place: str = "") -> str:
    """Return the dotted path of the first key that a file lacks, or an empty string."""
    if isinstance(expected, dict):
        pairs: Iterable[tuple[Any, Any]] = expected.items()
        absent = [f"{place}{key}" for key in expected if key not in found]
        if absent:
            return absent[0]
    elif isinstance(expected, list) and expected and isinstance(expected[0], dict | list):
        pairs = enumerate(expected)
    else:
        return ""
    return next(filter(None, (_first_missing(item, found[key], f"{place}{key}.") for key, item in pairs)), "")


def _first_infinite(data: Any, place: str = "") -> str:
    """Return the dotted path of the first number that is NaN or infinite, or an empty string."""
    if isinstance(data, float) and not math.isfinite(data):
        return place
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    below = (_first_infinite(item, f"{place}.{key}".lstrip(".")) for key, item in pairs if not isinstance(item, str))
    return next(filter(None, below), "")


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
