"""The record of an edit: its keys, its round trip, and what a fit writes into it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sealign
from sealign.edits.edit import Edit
from sealign.edits.record import FORMAT, FORMAT_VERSION, EditRecord, LayerRecord, ModelRecord, model_record
from sealign.errors import EditFileError
from sealign.files import tensors_hash
from sealign.methods.activation_fit import LayerFit, build_edit
from sealign.methods.method import FitContext
from sealign.methods.sea import SEAConfig
from sealign.models.fingerprint import model_fingerprint
from sealign.models.prompt_format import PromptFormat, default_preamble
from sealign.record_files import read_record, write_record
from tests.edits.edit_data import make_affine, make_record
from tests.tiny_models import build_model

KEYS = {
    "": "format format_version method strength site normalization feature_map combine layers config learned model "
    "demonstrations_hash fitted_on holdout example fit_seconds versions tensors_hash",
    "layers.1": "module rank groups scale relative_change statistics",
    "model": "id revision fingerprint tokenizer_hash template_hash weights_hash weights_type",
}
"""The keys of ``edit.json`` by section: files that were written must stay readable."""

FREE = ("config", "learned")
"""Sections whose keys depend on the method."""


def parse(text: str, folder: Path) -> EditRecord:
    (folder / "edit.json").write_text(text, encoding="utf-8")
    return read_record(folder / "edit.json", EditRecord, format=FORMAT, format_version=FORMAT_VERSION)


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the paths and values of all leaves of a JSON object."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    else:
        yield path, value


def changed(path: tuple[str, ...], value: Any = None, *, delete: bool = False) -> str:
    """Return the JSON text of a record with one value changed, added or deleted."""
    data = json.loads(write_record(make_record()))
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if delete:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return json.dumps(data)


LEAVES = dict(leaves(json.loads(write_record(make_record()))))
TYPED = {path: value for path, value in LEAVES.items() if path[0] not in FREE}
OPTIONAL = ("revision", "strength", "site", "combine", "demonstrations_hash", "holdout", "example")


def test_keys_of_the_file() -> None:
    data = json.loads(write_record(make_record()))
    for section, keys in KEYS.items():
        inner = data
        for part in filter(None, section.split(".")):
            inner = inner[part]
        assert list(inner) == keys.split()
    assert (data["format"], data["format_version"]) == ("sealign.edit", 3)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    record = make_record(strength=0.1 + 0.2, feature_map="tanh", combine="both", learned={"heads": [[1, 2]], "x": None})
    back = parse(write_record(record), tmp_path)
    assert back == record
    assert write_record(back) == write_record(record)
    # Equality takes 1 for 1.0 and True; hashes and messages do not.
    assert repr(back) == repr(record)


finite = st.floats(allow_nan=False, allow_infinity=False)
plain = st.none() | st.booleans() | st.integers(0, 2**40) | finite | st.text()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    strength=st.none() | finite,
    figure=finite,
    rank=st.integers(0, 10_000),
    name=st.text(),
    revision=st.none() | st.text(),
    fingerprint=st.dictionaries(st.text(), plain),
    config=st.dictionaries(st.text(), plain | st.lists(plain) | st.dictionaries(st.text(), plain)),
)
def test_round_trip_of_any_values(
    shared: Path,
    strength: float | None,
    figure: float,
    rank: int,
    name: str,
    revision: str | None,
    fingerprint: dict[str, Any],
    config: dict[str, Any],
) -> None:
    record = make_record(strength=strength, config=config)
    layer = dataclasses.replace(record.layers["1"], rank=rank, module=name, statistics={name: figure})
    model = dataclasses.replace(record.model, id=name, revision=revision, fingerprint=fingerprint)
    record = dataclasses.replace(record, layers={"1": layer}, model=model)
    assert repr(parse(write_record(record), shared)) == repr(record)


def test_whole_numbers_are_read_as_numbers(tmp_path: Path) -> None:
    record = parse(changed(("strength",), 1), tmp_path)
    assert repr(record.strength) == "1.0"


@pytest.mark.parametrize("section", KEYS)
def test_missing_keys_are_refused_by_name(section: str, tmp_path: Path) -> None:
    parts = tuple(filter(None, section.split(".")))
    for key in KEYS[section].split():
        text = changed((*parts, key), delete=True)
        named = "'format'" if key == "format" else re.escape(f"has no key '{'.'.join((*parts, key))}'")
        with pytest.raises(EditFileError, match=rf"edit\.json'.*{named}"):
            parse(text, tmp_path)


@pytest.mark.parametrize("section", KEYS)
def test_unknown_keys_are_refused_by_name(section: str, tmp_path: Path) -> None:
    path = (*filter(None, section.split(".")), "surprise")
    name = re.escape(".".join(path))
    message = rf"edit\.json' has an unknown key '{name}'; it was changed by hand .*download it again"
    with pytest.raises(EditFileError, match=message):
        parse(changed(path, 1), tmp_path)


@pytest.mark.parametrize("path", TYPED, ids=".".join)
def test_wrong_types_are_refused_by_name(path: tuple[str, ...], tmp_path: Path) -> None:
    old = TYPED[path]
    wrong: list[Any] = [{}] if path[-1] in ("groups", "fitted_on") else [[], {}]
    if path[1:2] != ("fingerprint",):  # of any plain type
        text = isinstance(old, str) or path[-1] in ("revision", "combine")
        wrong += [3] if text else ["3"]
        wrong += [] if path[-1] in OPTIONAL else [None]
        wrong += [1] if isinstance(old, bool) else [True]
        wrong += [2.5] if isinstance(old, int) else []
    for value in wrong:
        with pytest.raises(EditFileError, match=rf"edit\.json'.*'{re.escape('.'.join(path))}|'format'"):
            parse(changed(path, value), tmp_path)


@pytest.mark.parametrize("path", [path for path, value in TYPED.items() if isinstance(value, float)], ids=".".join)
def test_numbers_must_be_finite(path: tuple[str, ...], tmp_path: Path) -> None:
    marked = changed(path, "NUMBER")
    reason = "" if "fingerprint" in path else "finite"  # a value of the fingerprint may have one of several types
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        with pytest.raises(EditFileError, match=f"at key '{re.escape('.'.join(path))}.*{reason}"):
            parse(marked.replace('"NUMBER"', number), tmp_path)


def test_numbers_in_the_settings_must_be_finite_too(tmp_path: Path) -> None:
    with pytest.raises(EditFileError, match=r"has a number at key 'config\.seed' that is not finite"):
        parse(changed(("config", "seed"), float("nan")), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"edit\.json' is not JSON \(.* at line 1\); it is truncated or corrupted, copy or download it again"),
        ("\ufeff{}", "is not JSON"),
        ("\x00" * 40, "is not JSON"),
        ("[]", "holds no JSON object; check the path"),
        ("null", "holds no JSON object"),
        ("{}", "is not a sealign.edit file: its 'format' is None; check the path"),
        ('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}', "is not a sealign.edit file"),
        (changed(("format",), "sealign.model"), "is not a sealign.edit file: its 'format' is 'sealign.model'"),
        (changed(("format_version",), 4), "has format version 4, but .* reads version 3; upgrade sealign"),
        (changed(("format_version",), 99), "has format version 99, but .* reads version 3; upgrade sealign"),
        (changed(("format_version",), 1), "has format version 1, but .* reads version 3; fit it again"),
        (changed(("format_version",), 0), "has format version 0, but .* reads version 3"),
        (changed(("format_version",), -1), "has format version -1, but .* reads version 3"),
        (changed(("layers",), []), "at key 'layers'"),
        (changed(("layers", "1"), "all"), r"at key 'layers\.1'"),
    ],
)
def test_what_is_not_a_record_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(EditFileError, match=message):
        parse(text, tmp_path)


def test_a_newer_format_is_reported_before_its_unknown_keys(tmp_path: Path) -> None:
    data = json.loads(changed(("format_version",), 4)) | {"novelty": 1}
    with pytest.raises(EditFileError, match="upgrade sealign"):
        parse(json.dumps(data), tmp_path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    text = write_record(make_record()).rstrip()
    for length in range(0, len(text), 13):
        with pytest.raises(EditFileError, match=r"is not JSON .* truncated or corrupted"):
            parse(text[:length], tmp_path)


def test_what_cannot_be_read_back_is_not_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_record(make_record(strength=float("nan")))


def test_fields_are_named() -> None:
    """Records have too many fields of one type to give them by position."""
    with pytest.raises(TypeError, match="positional"):
        LayerRecord("model.layers.1.mlp", 3, (3,), 0.0, 0.5, {})  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        EditRecord("sea")  # type: ignore[misc, call-arg]


def test_settings_are_those_given_and_those_learned() -> None:
    record = make_record(config={"heads": 12, "seed": 0}, learned={"selected": [[1, 2]]})
    assert record.settings == {"heads": 12, "seed": 0, "selected": [[1, 2]]}


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return build_model("llama", vocab_size=len(tokenizer))


FITS = {
    3: LayerFit(make_affine(rank=6, groups=(4, 2), scale=-0.5, normalization="none"), 0.0625, {"signature": 6.5}),
    1: LayerFit(make_affine(rank=2, normalization="none", shift=True), 0.75, {"signature": 1.5, "overlap": 0.5}),
}
"""Fits of two layers that have nothing in common."""


def fitted(model: Any, tokenizer: Any, demonstrations: Any, **config: Any) -> Edit:
    return build_edit(FitContext(model, tokenizer, demonstrations), "sea", SEAConfig(**config), FITS)


def test_layers_of_a_fit(model: Any, tokenizer: Any, demonstrations: Any) -> None:
    edit = fitted(model, tokenizer, demonstrations, site="attention", strength=0.4)
    assert (edit.record.method, edit.site, edit.normalization, edit.strength) == ("sea", "attention", "none", 0.4)
    assert (edit.record.feature_map, edit.record.combine) == ("identity", None)
    assert list(edit.layer_edits) == [1, 3]
    assert list(edit.record.layers) == ["1", "3"]
    assert edit.modules == ["model.layers.1.self_attn", "model.layers.3.self_attn"]
    for layer, fit in FITS.items():
        assert edit.layer_edits[layer] is fit.layer_edit
        entry = edit.record.layers[str(layer)]
        assert (entry.rank, entry.scale) == ({1: 2, 3: 6}[layer], {1: 0.0, 3: -0.5}[layer])
        assert (entry.groups, entry.rank_text) == {1: ((), "2"), 3: ((4, 2), "4 + 2")}[layer]
        assert (entry.relative_change, entry.statistics) == (fit.relative_change, fit.statistics)
    assert edit.record.tensors_hash == tensors_hash(edit.tensors())


def test_modules_by_pattern(model: Any, tokenizer: Any, demonstrations: Any) -> None:
    edit = fitted(model, tokenizer, demonstrations, module_pattern="model.layers.{layer}.mlp.down_proj")
    assert edit.modules == ["model.layers.1.mlp.down_proj", "model.layers.3.mlp.down_proj"]


def test_hashes_and_versions(model: Any, tokenizer: Any, demonstrations: Any) -> None:
    record = fitted(model, tokenizer, demonstrations).record
    lines = [json.dumps([item.prompt, item.positive, item.negative]) for item in demonstrations]
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    assert record.fitted_on == [item.hash for item in demonstrations]
    assert record.demonstrations_count == 7
    assert record.example == f"<user>{demonstrations[0].prompt}\n<model> {demonstrations[0].positive}"
    assert record.demonstrations_hash == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert record.model.tokenizer_hash == hashlib.sha256(vocabulary.encode()).hexdigest()
    assert record.model.template_hash == hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
    assert record.model.fingerprint == model_fingerprint(model)
    assert record.model.fingerprint["layer_classes"] == "LlamaDecoderLayer x 4"
    assert sorted(record.versions) == ["python", "sealign", "torch", "transformers"]
    assert record.versions["transformers"] == transformers.__version__
    assert record.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record.versions["python"] == platform.python_version()
    assert 0 <= record.fit_seconds < 60


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {},
            {
                "layers": "last:21/32",
                "rank": None,
                "explained_variance": None,
                "prompt_format": dataclasses.asdict(PromptFormat("chat")),
            },
        ),
        (
            {"rank": (3, 2), "layers": (1, 3), "prompt_format": PromptFormat("few_shot")},
            {
                "rank": [3, 2],
                "layers": [1, 3],
                "prompt_format": dataclasses.asdict(PromptFormat("few_shot", default_preamble())),
            },
        ),
        ({"explained_variance": (0.9, 0.8)}, {"explained_variance": [0.9, 0.8], "rank": None}),
    ],
)
def test_the_settings_of_the_fit_are_json(
    config: dict[str, Any], expected: Any, model: Any, tokenizer: Any, demonstrations: Any
) -> None:
    found = fitted(model, tokenizer, demonstrations, **config).record.config
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert {name: found[name] for name in expected} == expected
    assert set(found) == set(SEAConfig.model_fields)


def test_a_record_of_a_fit_comes_back_from_its_text(
    model: Any, tokenizer: Any, demonstrations: Any, tmp_path: Path
) -> None:
    record = fitted(model, tokenizer, demonstrations, rank=(3, 2), layers=(1, 3)).record
    assert parse(write_record(record), tmp_path) == record


def test_the_record_of_a_whole_fit(small_edit: sealign.Edit) -> None:
    assert sum(tensor.numel() for tensor in small_edit.tensors().values()) == 2 * 2 * 5 * 48
    assert small_edit.record.tensors_hash == tensors_hash(small_edit.tensors())
    assert 0 < small_edit.fit_seconds < 600


def test_the_models_name_and_revision(tokenizer: Any) -> None:
    def recorded(model: nn.Module) -> tuple[str, str | None]:
        record = model_record(model, tokenizer)
        return record.id, record.revision

    model = build_model("llama", vocab_size=len(tokenizer))
    assert recorded(model) == ("LlamaForCausalLM", None)  # built from a configuration: its name is empty
    model.name_or_path, model.config._commit_hash = "someone/small-llama", "0a1b2c"
    assert recorded(model) == ("someone/small-llama", "0a1b2c")
    wrapped = nn.Module()
    wrapped._orig_mod = model  # as torch.compile does
    assert recorded(wrapped) == ("someone/small-llama", "0a1b2c")


def test_a_model_that_has_no_name(model: Any, tokenizer: Any, demonstrations: Any) -> None:
    class Nameless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.config = model.model, model.config

    edit = fitted(Nameless(), tokenizer, demonstrations)
    assert edit.record.model.id == "Nameless"
    assert edit.modules == ["model.layers.1.mlp", "model.layers.3.mlp"]
    assert isinstance(edit.base_model, ModelRecord)
