"""Record files: JSON that is written from a dataclass and read back strictly."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from sealign.errors import EditFileError, SealignError

Record = TypeVar("Record")

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
