"""Files of rows: JSON lines, JSON, CSV, TSV and Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sealign.errors import DemonstrationError, first_sentence

Row = Mapping[str, Any]

PlacedRows = Iterator[tuple[str, Row]]
"""Pairs of a place, such as ``file, line N``, and the row that is there."""


def read_rows(path: Path) -> PlacedRows:
    """Yield (place, row) for each row of a file, whose suffix, in any case, names its format.

    Args:
        path: One of

            - ``.jsonl`` or ``.ndjson``: a JSON object per line;
            - ``.json``: an array of objects, an object that holds one such array, or an object per line;
            - ``.csv`` or ``.tsv``: a header and rows, separated by commas, semicolons or tabs;
            - ``.parquet``, which needs the datasets extra.

            Text is in UTF-8.

    Raises:
        DemonstrationError: The file is missing, empty, of another format or not UTF-8, or a row is malformed.
    """
    if not path.is_file():
        raise DemonstrationError(f"there is no file '{path}'; check the path")
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        known = ", ".join(FORMATS)
        raise DemonstrationError(f"'{path}' has the suffix '{path.suffix}', but it must be one of {known}; convert it")
    return FORMATS[suffix](path)


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        raise DemonstrationError(f"'{path}' is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    if not text.strip():
        raise DemonstrationError(f"'{path}' is empty; write at least 2 demonstrations")
    return text


def _json_lines(path: Path) -> PlacedRows:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DemonstrationError(
                f"{place}: not JSON ({error.msg} at column {error.colno}); write one JSON object per line"
            ) from error
        except RecursionError as error:
            raise DemonstrationError(f"{place}: JSON that is nested too deeply; write texts") from error
        if not isinstance(row, dict):
            raise DemonstrationError(f"{place}: found a {type(row).__name__}, but every line must be a JSON object")
        yield place, row


def _json(path: Path) -> PlacedRows:
    try:
        data = json.loads(_text(path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # more than one value: an object per line
            yield from _json_lines(path)
            return
        raise DemonstrationError(
            f"'{path}' is not JSON ({error.msg} at line {error.lineno}, column {error.colno}); write an array"
        ) from error
    except RecursionError as error:
        raise DemonstrationError(f"'{path}' is JSON that is nested too deeply; write an array of objects") from error
    if isinstance(data, dict):
        arrays = [value for value in data.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        data = arrays[0] if len(arrays) == 1 else data
    if not isinstance(data, list):
        raise DemonstrationError(
            f"'{path}' holds no array of objects; write one, or one object per line in a .jsonl file"
        )
    for index, row in enumerate(data):
        place = f"{path}, item {index}"
        if not isinstance(row, dict):
            raise DemonstrationError(f"{place}: found a {type(row).__name__}, but every item must be a JSON object")
        yield place, row


def _separated(path: Path) -> PlacedRows:
    text = _text(path)
    header = text.lstrip().partition("\n")[0]
    separator = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text), strict=True, delimiter=separator)
    last = 0
    try:
        for row in reader:
            last = reader.line_num
            place = f"{path}, line {last}"
            if None in row:
                raise DemonstrationError(
                    f"{place}: more fields than columns; enclose texts with {_NAMES[separator]} in double quotes"
                )
            yield place, row
    except csv.Error as error:
        raise DemonstrationError(
            f"{path}, from line {last + 1} on: not CSV ({error}); close every quotation mark, and double those in texts"
        ) from error


_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs"}


def _parquet(path: Path) -> PlacedRows:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise DemonstrationError(
            f"reading '{path}' needs the datasets extra: pip install 'sealign[datasets]'"
        ) from error
    try:
        rows = read_table(path).to_pylist()
    except ArrowException as error:
        raise DemonstrationError(
            f"'{path}' is not a Parquet file ({first_sentence(error)}); copy or download it again"
        ) from error
    for index, row in enumerate(rows):
        yield f"{path}, row {index}", row


FORMATS: Mapping[str, Callable[[Path], PlacedRows]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _separated,
    ".tsv": _separated,
    ".parquet": _parquet,
}
"""Reader of each suffix."""
