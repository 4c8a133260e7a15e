"""The strict reader of record files."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from sealign.errors import EditFileError, ResultsFileError
from sealign.record_files import RECORD_CONFIG, read_record, write_record


@dataclass(frozen=True)
class Part:
    __pydantic_config__: ClassVar[Any] = RECORD_CONFIG
    name: str
    weights: list[float]
    note: str | None = None


@dataclass(frozen=True)
class Whole:
    __pydantic_config__: ClassVar[Any] = RECORD_CONFIG
    parts: dict[str, Part]
    count: int
    share: float
    flag: bool = True
    anything: dict[str, Any] = field(default_factory=dict)
    format: str = "test.whole"
    format_version: int = 2


WHOLE = Whole({"a": Part("one", [1.0, 0.1 + 0.2]), "b": Part("two", [], "x")}, 3, 2.0, False, {"deep": [{"x": 1}]})


def read_changed(path: Path, change: Any, **arguments: Any) -> Whole:
    """Read a record file with other data (``change`` edits them and returns None) or another text."""
    data = json.loads(write_record(WHOLE))
    text = change if isinstance(change, str) else change(data) or json.dumps(data)
    path.write_text(text, encoding="utf-8")
    return read_record(path, Whole, format="test.whole", format_version=2, **arguments)


def test_records_come_back_exactly(tmp_path: Path) -> None:
    assert repr(read_changed(tmp_path / "a.json", lambda data: None)) == repr(WHOLE)
    assert write_record(WHOLE).startswith('{\n  "parts": {\n    "a": {')
    assert write_record(WHOLE).endswith("}\n")


def test_integers_are_numbers(tmp_path: Path) -> None:
    assert repr(read_changed(tmp_path / "a.json", lambda data: data.update(share=1)).share) == "1.0"


BY_HAND = "; it was changed by hand or by another program, copy or download it again"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("", "is not JSON (Expecting value at line 1); it is truncated or corrupted, copy or download it again"),
        (
            '{\n"a"',
            "is not JSON (Expecting ':' delimiter at line 2); it is truncated or corrupted, copy or download it",
        ),
        (
            "[" * 100_000,
            "is not JSON (it is nested too deeply); it is truncated or corrupted, copy or download it again",
        ),
        ("[1]", "holds no JSON object; check the path"),
        ("{}", "is not a test.whole file: its 'format' is None; check the path"),
        (lambda data: data.update(format="other"), "is not a test.whole file: its 'format' is 'other'; check the path"),
        (
            lambda data: data.update(format_version=3, novelty=1),
            "has format version 3, but this version of Sealign reads version 2; upgrade sealign",
        ),
        (
            lambda data: data.update(format_version=1),
            "has format version 1, but this version of Sealign reads version 2; fit it again with this version",
        ),
        (lambda data: data.update(format_version=True), "has True at key 'format_version', which must be a valid int"),
        (lambda data: data.__delitem__("format_version"), "has no key 'format_version'" + BY_HAND),
        (lambda data: data.__delitem__("count"), "has no key 'count'" + BY_HAND),
        (lambda data: data.__delitem__("flag"), "has no key 'flag'" + BY_HAND),
        (lambda data: data["parts"]["b"].__delitem__("note"), "has no key 'parts.b.note'" + BY_HAND),
        (lambda data: data["parts"]["b"].__delitem__("name"), "has no key 'parts.b.name'" + BY_HAND),
        (lambda data: data["parts"]["b"].update(more=1), "has an unknown key 'parts.b.more'" + BY_HAND),
        (lambda data: data.update(flag=1), "has 1 at key 'flag', which must be a valid boolean" + BY_HAND),
        (lambda data: data.update(count=2.0), "has 2.0 at key 'count', which must be a valid integer" + BY_HAND),
        (lambda data: data.update(count="3"), "has '3' at key 'count', which must be a valid integer" + BY_HAND),
        (lambda data: data.update(share=True), "has True at key 'share', which must be a valid number" + BY_HAND),
        (
            lambda data: data["parts"]["a"]["weights"].append("x"),
            "has 'x' at key 'parts.a.weights.2', which must be a valid number" + BY_HAND,
        ),
        (lambda data: data["parts"].update(a=3), "has 3 at key 'parts.a', which must be an object" + BY_HAND),
        (lambda data: json.dumps(data).replace("2.0", "NaN"), "has nan at key 'share', which must be a finite number"),
        (lambda data: json.dumps(data).replace("2.0", "1e999"), "has inf at key 'share', which must be a finite numb"),
        (
            lambda data: json.dumps(data).replace('"x": 1', '"x": Infinity'),
            "has a number at key 'anything.deep.0.x' that is not finite" + BY_HAND,
        ),
        (
            lambda data: json.dumps(data).replace('"x": 1', '"x": ' + "[" * 400 + "]" * 400),
            "is not JSON (it is nested too deeply)",
        ),
    ],
)
def test_one_sentence_names_file_and_key(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(EditFileError, match="^" + re.escape(f"'{path}' {message}")):
        read_changed(path, change)


def test_record_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(EditFileError, match=r"^there is no file '.*a\.json'; check the path$"):
        read_record(tmp_path / "a.json", Whole, format="test.whole", format_version=2)
    (tmp_path / "a.json").write_bytes(b'{"format": "\xff"}')
    with pytest.raises(EditFileError, match=r"is not JSON \(it is not UTF-8 at byte 12\)"):
        read_record(tmp_path / "a.json", Whole, format="test.whole", format_version=2)


def test_error_class_and_remedy_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ResultsFileError, match="reads version 2; evaluate again$"):
        read_changed(
            tmp_path / "a.json",
            lambda data: data.update(format_version=1),
            error=ResultsFileError,
            remake="evaluate again",
        )


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    text = write_record(WHOLE).rstrip()
    for length in range(len(text)):
        with pytest.raises(EditFileError, match=r"is not JSON .* truncated or corrupted"):
            read_changed(tmp_path / "a.json", text[:length])


def test_numbers_that_cannot_be_read_back_are_not_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_record(Part("a", [float("nan")]))
