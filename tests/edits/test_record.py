from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealign.edits.record import EditRecord, EditSettings, LayerRecord, ModelRecord, dump_record, parse_record
from sealign.errors import EditFileError

KEYS = {
    "": "settings layers model fit demonstrations_hash demonstrations_count versions tensors_hash format "
    "format_version",
    "settings": "site combine normalization strength feature_map centered",
    "layers.1": "module rank_positive rank_negative explained_variance_positive explained_variance_negative "
    "energy_positive energy_negative relative_change signature",
    "model": "id revision fingerprint tokenizer_hash template_hash",
}
"""The keys of ``edit.json`` by section: files that were written must stay readable."""


def make_record(**changes: Any) -> EditRecord:
    """A record of two layers with unequal ranks; changes are of the settings."""
    given_settings: dict[str, Any] = {
        "site": "mlp",
        "combine": "both",
        "normalization": "token",
        "strength": 0.7,
        "feature_map": "identity",
        "centered": False,
    }
    layers = {
        "1": LayerRecord("model.layers.1.mlp", 3, 2, 0.91, 0.84, 7.5, 1e-3, 0.0625, 12.25),
        "3": LayerRecord("model.layers.3.mlp", 1, 4, 1.0, 0.9999, 2.0, 3.0, 0.5, 1e6),
    }
    fingerprint: dict[str, str | int | float | bool | None] = {
        "model_type": "llama",
        "hidden_size": 11,
        "rope": 1.0,
        "tie_word_embeddings": True,
        "head_dim": None,
    }
    return EditRecord(
        settings=EditSettings(**(given_settings | changes)),
        layers=layers,
        model=ModelRecord("owner/tiny-llama", "0f3c", fingerprint, "aa" * 32, "bb" * 32),
        fit={"rank": [3, 2], "prompt_format": {"style": "chat", "preamble": None}, "seed": 0},
        demonstrations_hash="cc" * 32,
        demonstrations_count=7,
        versions={"sealign": "0.1.0", "torch": "2.13.0"},
        tensors_hash="dd" * 32,
    )


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The paths and values of all leaves of a JSON object."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    else:
        yield path, value


def changed(path: tuple[str, ...], value: Any = None, *, delete: bool = False) -> str:
    """The JSON text of a record with one value changed, added or deleted."""
    data = json.loads(dump_record(make_record()))
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if delete:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return json.dumps(data)


LEAVES = dict(leaves(json.loads(dump_record(make_record()))))
TYPED = {path: value for path, value in LEAVES.items() if path[0] != "fit"}


def test_keys_of_the_file() -> None:
    data = json.loads(dump_record(make_record()))
    for section, keys in KEYS.items():
        inner = data
        for part in filter(None, section.split(".")):
            inner = inner[part]
        assert set(inner) == set(keys.split())
    assert (data["format"], data["format_version"]) == ("sealign.edit", 1)


def test_round_trip_is_exact() -> None:
    record = make_record(centered=True, strength=0.1 + 0.2)
    back = parse_record(dump_record(record), "edit.json")
    assert back == record
    assert dump_record(back) == dump_record(record)
    # Equality takes 1 for 1.0 and True; hashes and messages do not.
    assert repr(back) == repr(record)


finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    strength=finite,
    energy=finite,
    rank=st.integers(0, 10_000),
    name=st.text(),
    revision=st.none() | st.text(),
    fingerprint=st.dictionaries(st.text(), st.none() | st.booleans() | st.integers(0, 2**40) | finite | st.text()),
)
def test_round_trip_of_any_values(
    strength: float, energy: float, rank: int, name: str, revision: str | None, fingerprint: dict[str, Any]
) -> None:
    record = make_record(strength=strength)
    layer = dataclasses.replace(record.layers["1"], energy_positive=energy, rank_negative=rank, module=name)
    model = dataclasses.replace(record.model, id=name, revision=revision, fingerprint=fingerprint)
    record = dataclasses.replace(record, layers={"1": layer}, model=model)
    assert repr(parse_record(dump_record(record), "edit.json")) == repr(record)


def test_whole_numbers_are_read_as_numbers() -> None:
    record = parse_record(changed(("settings", "strength"), 1), "edit.json")
    assert repr(record.settings.strength) == "1.0"


@pytest.mark.parametrize("section", KEYS)
def test_missing_keys_are_refused_by_name(section: str) -> None:
    parts = tuple(filter(None, section.split(".")))
    for key in KEYS[section].split():
        text = changed((*parts, key), delete=True)
        with pytest.raises(EditFileError, match=rf"'here/edit\.json'.*'{re.escape('.'.join((*parts, key)))}'"):
            parse_record(text, "here/edit.json")


@pytest.mark.parametrize("section", KEYS)
def test_unknown_keys_are_refused_by_name(section: str) -> None:
    path = (*filter(None, section.split(".")), "surprise")
    name = re.escape(".".join(path))
    message = f"'edit.json' is not valid at '{name}': unexpected.*; it was changed by hand .*download it again"
    with pytest.raises(EditFileError, match=message):
        parse_record(changed(path, 1), "edit.json")


@pytest.mark.parametrize("path", TYPED, ids=".".join)
def test_wrong_types_are_refused_by_name(path: tuple[str, ...]) -> None:
    old = TYPED[path]
    wrong: list[Any] = [[], {}]
    if path[1:2] != ("fingerprint",):  # of any plain type
        wrong += [3] if isinstance(old, str) or path[-1] == "revision" else ["3"]
        wrong += [] if old is None or path[-1] == "revision" else [None]
        wrong += [1] if isinstance(old, bool) else [True]
        wrong += [2.5] if isinstance(old, int) else []
    for value in wrong:
        with pytest.raises(EditFileError, match=rf"edit\.json'.*{re.escape('.'.join(path[:3]))}|'format'"):
            parse_record(changed(path, value), "edit.json")


@pytest.mark.parametrize("path", [path for path, value in TYPED.items() if isinstance(value, float)], ids=".".join)
def test_numbers_must_be_finite(path: tuple[str, ...]) -> None:
    marked = changed(path, "NUMBER")
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        reason = "" if "fingerprint" in path else "finite number"
        with pytest.raises(EditFileError, match=f"is not valid at '{re.escape('.'.join(path[:3]))}.*{reason}"):
            parse_record(marked.replace('"NUMBER"', number), "edit.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"'edit\.json' is not JSON \(.* at line 1\); it is truncated or corrupted, copy or download it again"),
        ("\ufeff{}", "is not JSON"),
        ("\x00" * 40, "is not JSON"),
        ("[]", "is not an edit: its 'format' is not 'sealign.edit'; check the path"),
        ("null", "is not an edit"),
        ("{}", "is not an edit"),
        ('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}', "is not an edit"),
        (changed(("format",), "sealign.model"), "is not an edit"),
        (changed(("format_version",), 2), "has format version 2, but this Sealign reads 1 to 1; upgrade sealign"),
        (changed(("format_version",), 99), "has format version 99, but this Sealign reads 1 to 1; upgrade sealign"),
        (changed(("format_version",), 0), "has format version 0, but this Sealign reads 1 to 1"),
        (changed(("format_version",), -1), "has format version -1, but this Sealign reads 1 to 1"),
        (changed(("layers",), []), "is not valid at 'layers'"),
        (changed(("layers", "1"), "all"), "is not valid at 'layers.1'"),
    ],
)
def test_what_is_not_a_record_is_refused(text: str, message: str) -> None:
    with pytest.raises(EditFileError, match=message):
        parse_record(text, "edit.json")


def test_a_newer_format_is_told_before_its_unknown_keys() -> None:
    data = json.loads(changed(("format_version",), 2)) | {"novelty": 1}
    with pytest.raises(EditFileError, match="upgrade sealign"):
        parse_record(json.dumps(data), "edit.json")


def test_every_truncation_is_refused() -> None:
    text = dump_record(make_record()).rstrip()
    for length in range(0, len(text), 13):
        with pytest.raises(EditFileError, match=r"is not JSON .* truncated or corrupted"):
            parse_record(text[:length], "edit.json")


def test_what_cannot_be_read_back_is_not_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump_record(make_record(strength=float("nan")))
