from __future__ import annotations

import dataclasses
import errno
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sealign.edits.edit import Edit
from sealign.edits.record import EditRecord, dump_record
from sealign.errors import EditFileError, SettingError, SiteError
from sealign.files import read_tensors, tensors_hash, write_tensors
from sealign.spectral.feature_maps import FEATURE_MAPS
from sealign.spectral.projection import COMBINES, NORMALIZATIONS, Projection
from tests.edits.test_record import make_record

FILES = ["README.md", "edit.json", "edit.safetensors"]
D = 11


def make_edit(dtype: torch.dtype = torch.float32, **changes: Any) -> Edit:
    """An edit of layers 1 and 3 with unequal ranks, (3, 2) and (1, 4); changes are of the settings."""
    record = make_record(**changes)
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def factors(plus: int, minus: int) -> tuple[Tensor, ...]:
        bases = [torch.linalg.qr(draw(D, k))[0] for k in (plus, minus)]
        values = [draw(k + 2).abs().sort(descending=True)[0] for k in (plus, minus)]
        return tuple(tensor.to(dtype) for tensor in (*bases, draw(D), *values))

    projections = {}
    for layer, entry in record.layers.items():
        plus, minus, mean, *values = factors(entry.rank_positive, entry.rank_negative)
        kept = mean if record.settings.centered else None
        energies = entry.energy_positive, entry.energy_negative
        first, second = values
        projections[int(layer)] = Projection(plus, minus, kept, record.settings.feature_map, first, second, *energies)
    return Edit(projections, dataclasses.replace(record, tensors_hash=""))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a saved edit."""
    make_edit(centered=True).save_pretrained(tmp_path / "edit")
    return tmp_path / "edit"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def bits(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def parts(projection: Projection) -> list[Any]:
    """Everything that a projection holds, tensors to the bit."""
    values = [getattr(projection, field.name) for field in dataclasses.fields(projection)]
    return [bits(value) if isinstance(value, Tensor) else value for value in values]


def assert_same(first: Edit, second: Edit) -> None:
    assert first.layers == second.layers
    for layer in first.layers:
        assert parts(first.projections[layer]) == parts(second.projections[layer])
    assert repr(dataclasses.replace(first.record, tensors_hash="")) == repr(
        dataclasses.replace(second.record, tensors_hash="")
    )
    assert first.hash == second.hash


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip_to_the_bit(tmp_path: Path, dtype: torch.dtype, centered: bool, feature_map: str) -> None:
    edit = make_edit(dtype, centered=centered, feature_map=feature_map, combine="average", strength=0.1)
    edit.save_pretrained(tmp_path / "edit")
    back = Edit.from_pretrained(tmp_path / "edit")
    assert_same(edit, back)
    assert_same(edit, Edit.from_pretrained(str(tmp_path / "edit")))
    x = torch.randn(2, 5, D, dtype=torch.float64)
    for layer in edit.layers:
        torch.testing.assert_close(edit.projections[layer](x), back.projections[layer](x))


def test_round_trip_of_a_fit(small_edit: Edit, tmp_path: Path) -> None:
    small_edit.save_pretrained(tmp_path / "a" / "edit")
    back = Edit.from_pretrained(tmp_path / "a" / "edit")
    assert_same(small_edit, back)
    assert back.layers == [1, 3]
    assert back.modules == ["model.layers.1.mlp", "model.layers.3.mlp"]
    assert back.settings == small_edit.record.settings
    assert len(back.hash) == 64


def test_files_hold_json_and_plain_numbers_only(folder: Path) -> None:
    assert names_in(folder) == FILES
    assert json.loads((folder / "edit.json").read_text())["format"] == "sealign.edit"
    # The layout of safetensors, read by hand: length of a JSON header, header, little-endian numbers.
    data = (folder / "edit.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, numbers = json.loads(data[8 : 8 + length]), data[8 + length :]
    expected = {}
    for layer, projection in make_edit(centered=True).projections.items():
        for field in dataclasses.fields(projection):
            value = getattr(projection, field.name)
            if isinstance(value, Tensor):
                expected[f"layers.{layer}.{field.name}"] = value
    assert set(header) == set(expected)
    assert sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values()) == len(numbers)
    for name, tensor in expected.items():
        start, end = header[name]["data_offsets"]
        values = struct.unpack(f"<{tensor.numel()}f", numbers[start:end])
        assert header[name]["dtype"] == "F32"
        assert header[name]["shape"] == list(tensor.shape)
        assert values == tuple(tensor.flatten().tolist())


def test_equal_edits_are_saved_as_equal_files(folder: Path, tmp_path: Path) -> None:
    make_edit(centered=True).save_pretrained(tmp_path / "again")
    Edit.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    assert contents(folder) == contents(tmp_path / "again") == contents(tmp_path / "copy")


def test_factors_that_share_memory_or_are_not_contiguous_are_saved(tmp_path: Path) -> None:
    block = torch.linalg.qr(torch.randn(D, 5))[0]
    edit = make_edit()
    first = dataclasses.replace(edit.projections[1], positive=block[:, :3], negative=block[:, 3:])
    second = dataclasses.replace(edit.projections[3], positive=block[:, :1], negative=block[:, 1:])
    edit = dataclasses.replace(edit, projections={1: first, 3: second})
    edit.save_pretrained(tmp_path / "edit")
    assert_same(edit, Edit.from_pretrained(tmp_path / "edit"))


def rewrite(
    folder: Path,
    *,
    tensors: Callable[[dict[str, Tensor]], object] | None = None,
    record: Callable[[dict[str, Any]], object] | None = None,
) -> None:
    """Change tensors and record of a saved edit, with a hash that fits, as another program could."""
    held = read_tensors(folder / "edit.safetensors")
    data = json.loads((folder / "edit.json").read_text())
    if tensors is not None:
        tensors(held)
    data["tensors_hash"] = tensors_hash(held)
    if record is not None:
        record(data)
    write_tensors(folder / "edit.safetensors", held)
    (folder / "edit.json").write_text(json.dumps(data))


def test_rewriting_alone_is_not_refused(folder: Path) -> None:
    rewrite(folder)
    assert_same(Edit.from_pretrained(folder), make_edit(centered=True))


def put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: value})


def drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def poison(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[-1:].fill_(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (poison("layers.1.positive", float("nan")), "layers.1.positive holds NaN"),
        (poison("layers.3.negative", float("inf")), "layers.3.negative holds NaN, infinity"),
        (poison("layers.3.mean", float("-inf")), "layers.3.mean holds NaN, infinity"),
        (poison("layers.1.singular_values_negative", float("nan")), "layers.1.singular_values_negative holds NaN"),
        (put("layers.1.mean", torch.zeros(D, dtype=torch.int64)), "layers.1.mean holds .* no floating-point numbers"),
        (put("layers.1.positive", torch.zeros(D, 2)), r"layers.1.positive is \(11, 2\), but must be \(11, 3\)"),
        (
            put("layers.1.positive", torch.zeros(3, D)),
            r"layers.1.positive is \(3, 11\), but must be \(3, 3\)",
        ),
        (put("layers.3.negative", torch.zeros(D - 1, 4)), r"layers.3.negative is \(10, 4\), but must be \(11, 4\)"),
        (put("layers.3.negative", torch.zeros(44)), r"layers.3.negative is \(44,\), but must be \(11, 4\)"),
        (put("layers.1.positive", torch.zeros(())), r"layers.1.positive is \(\), but must be \(0, 3\)"),
        (put("layers.1.mean", torch.zeros(1)), r"layers.1.mean is \(1,\), but must be \(11,\)"),
        (
            put("layers.1.singular_values_positive", torch.ones(2)),
            r"layers.1.singular_values_positive is \(2,\), but must be \(3,\)",
        ),
        (
            put("layers.3.singular_values_negative", torch.ones(3, 2)),
            r"layers.3.singular_values_negative is \(3, 2\), but must be \(6,\)",
        ),
        (drop("layers.1.mean"), r"missing: \['layers.1.mean'\]"),
        (drop("layers.3.singular_values_positive"), r"missing: \['layers.3.singular_values_positive'\]"),
        (put("layers.7.positive", torch.zeros(D, 1)), r"not in the record: \['layers.7.positive'\]"),
        (put("layers.1.bias", torch.zeros(D)), r"not in the record: \['layers.1.bias'\]"),
        (put("layers.11.positive", torch.zeros(D, 3)), r"not in the record: \['layers.11.positive'\]"),
        (put("down_proj.weight", torch.zeros(2, 3)), r"not in the record: \['down_proj.weight'\]"),
    ],
)
def test_tensors_that_do_not_fit_the_record(
    folder: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    rewrite(folder, tensors=change)
    with pytest.raises(EditFileError, match=f"edit'.*{message}"):
        Edit.from_pretrained(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("settings.combine", "bth", r"edit\.json': unknown combination 'bth' \(did you mean 'both'\?\)"),
        ("settings.normalization", "l2", r"edit\.json': unknown normalization 'l2'; choose one of: token"),
        ("settings.feature_map", "tahn", r"edit\.json': unknown feature map 'tahn' \(did you mean 'tanh'\?\)"),
        ("settings.site", "mpl", r"edit\.json': unknown site 'mpl' \(did you mean 'mlp'\?\); choose one of: mlp, att"),
        ("settings.strength", float("inf"), r"edit\.json' is not valid at 'settings.strength': .*finite"),
        ("settings.strength", float("nan"), r"edit\.json' is not valid at 'settings.strength': .*finite"),
        ("settings.centered", False, r"not in the record: \['layers.1.mean', 'layers.3.mean'\]"),
        ("layers.1.rank_positive", 4, r"layers.1.positive is \(11, 3\), but must be \(11, 4\)"),
        ("layers.3.rank_negative", -4, r"layers.3.negative is \(11, 4\), but must be \(11, -4\)"),
        ("layers", {}, r"edit\.json' has no layers"),
        ("tensors_hash", "", "do not match their hash in edit.json; copy or download the edit again"),
        ("format_version", 2, "has format version 2, .* upgrade sealign"),
        ("surprise", 1, "is not valid at 'surprise'"),
        ("settings.surprise", 1, "is not valid at 'settings.surprise'"),
    ],
)
def test_a_record_that_does_not_fit(folder: Path, path: str, value: Any, message: str) -> None:
    def change(data: dict[str, Any]) -> None:
        *outer, last = path.split(".")
        for key in outer:
            data = data[key]
        data[last] = value

    rewrite(folder, record=change)
    with pytest.raises(EditFileError, match=message):
        Edit.from_pretrained(folder)


@pytest.mark.parametrize("name", ["01", "-1", "+3", "one", "1.0", "", "\u0663", "1 "])
def test_layers_must_be_whole_numbers(folder: Path, name: str) -> None:
    rewrite(folder, record=lambda data: data["layers"].update({name: data["layers"].pop("3")}))
    with pytest.raises(EditFileError, match=r"edit\.json': layer '.*' is not a whole number"):
        Edit.from_pretrained(folder)


def test_a_record_with_a_layer_more_or_less(folder: Path) -> None:
    rewrite(folder, record=lambda data: data["layers"].update({"2": data["layers"]["1"]}))
    with pytest.raises(EditFileError, match=r"missing: \['layers.2.mean', 'layers.2.negative'"):
        Edit.from_pretrained(folder)
    rewrite(folder, record=lambda data: (data["layers"].pop("2"), data["layers"].pop("1")))
    with pytest.raises(EditFileError, match=r"not in the record: \['layers.1.mean', 'layers.1.negative'"):
        Edit.from_pretrained(folder)


def test_missing_folders_and_files(folder: Path, tmp_path: Path) -> None:
    for place in ("nowhere", str(tmp_path / "nowhere"), "./owner/name", "~/edit"):
        with pytest.raises(EditFileError, match=f"there is no folder '{place}'; check the path, or give a repository"):
            Edit.from_pretrained(place)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EditFileError, match=r"empty' has no edit\.json, so it is not an edit; check the path"):
        Edit.from_pretrained(tmp_path / "empty")
    (folder / "README.md").unlink()  # for people only
    Edit.from_pretrained(folder)
    (folder / "edit.safetensors").unlink()
    with pytest.raises(EditFileError, match=r"there is no file '.*edit\.safetensors'; the folder is not complete"):
        Edit.from_pretrained(folder)
    (folder / "edit.json").unlink()
    with pytest.raises(EditFileError, match=r"has no edit\.json"):
        Edit.from_pretrained(folder)
    with pytest.raises(EditFileError, match="there is no folder"):
        Edit.from_pretrained(tmp_path / "file")


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_truncated_files(folder: Path, share: float) -> None:
    whole = contents(folder)
    (folder / "edit.safetensors").write_bytes(whole["edit.safetensors"][: int(share * len(whole["edit.safetensors"]))])
    with pytest.raises(EditFileError, match=r"edit\.safetensors' is truncated or corrupted"):
        Edit.from_pretrained(folder)
    (folder / "edit.safetensors").write_bytes(whole["edit.safetensors"])
    (folder / "edit.json").write_bytes(whole["edit.json"][: int(share * len(whole["edit.json"]))])
    with pytest.raises(EditFileError, match=r"edit\.json' is not JSON .* truncated or corrupted"):
        Edit.from_pretrained(folder)


def test_a_record_that_is_not_text(folder: Path) -> None:
    (folder / "edit.json").write_bytes(bytes(range(128, 256)))
    with pytest.raises(EditFileError, match=r"edit\.json' is not JSON"):
        Edit.from_pretrained(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """The folder of a saved edit whose tensors are overwritten, and their bytes."""
    folder = tmp_path_factory.mktemp("flipped") / "edit"
    make_edit(centered=True).save_pretrained(folder)
    return folder, (folder / "edit.safetensors").read_bytes()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_one_changed_byte_is_refused(saved: tuple[Path, bytes], data: st.DataObject) -> None:
    folder, whole = saved
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    inside = data.draw(st.booleans(), label="in the header")
    position = data.draw(st.integers(0, header - 1) if inside else st.integers(header, len(whole) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != whole[position]))
    (folder / "edit.safetensors").write_bytes(whole[:position] + bytes([byte]) + whole[position + 1 :])
    if inside and whole[position : position + 1] == b" " and bytes([byte]) in (b"\t", b"\n", b"\r"):
        return  # another blank in the padding is the same header
    with pytest.raises(EditFileError, match=r"truncated or corrupted|do not match their hash"):
        Edit.from_pretrained(folder)


def test_an_edit_replaces_an_edit(folder: Path) -> None:
    other = make_edit(centered=False, strength=0.2).with_layers([3])
    other.save_pretrained(folder)
    assert names_in(folder) == FILES
    assert_same(Edit.from_pretrained(folder), other)
    assert names_in(folder.parent) == ["edit"]


def test_a_loaded_edit_outlives_its_folder(folder: Path) -> None:
    loaded = Edit.from_pretrained(folder)
    before = loaded.hash
    make_edit(centered=True).randomized(3).save_pretrained(folder)
    assert loaded.hash == before
    assert Edit.from_pretrained(folder).hash != before


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make_edit().save_pretrained(tmp_path / "empty")
    assert names_in(tmp_path / "empty") == FILES


def test_what_is_not_an_edit_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(EditFileError, match="thesis' exists and was not written by Sealign, so it is not replaced"):
        make_edit().save_pretrained(tmp_path / "thesis")
    with pytest.raises(
        EditFileError, match=r"chapter\.tex' is a file, but the output is a folder; choose another name"
    ):
        make_edit().save_pretrained(tmp_path / "thesis" / "chapter.tex")
    assert contents(tmp_path / "thesis") == {"chapter.tex": b"x"}
    assert names_in(tmp_path) == ["thesis"]


def test_a_full_disk_leaves_the_old_edit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = contents(folder)
    monkeypatch.setattr("sealign.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        make_edit(strength=0.2).save_pretrained(folder)
    assert contents(folder) == before
    assert names_in(folder.parent) == ["edit"]


def test_settings_are_changed_in_a_copy() -> None:
    edit = make_edit()
    before = repr(edit.record), edit.hash
    changed = edit.with_settings(combine="negative", normalization="none", strength=-0.5)
    assert dataclasses.asdict(changed.settings) == dataclasses.asdict(edit.settings) | {
        "combine": "negative",
        "normalization": "none",
        "strength": -0.5,
    }
    assert changed.projections is edit.projections
    assert dataclasses.replace(changed.record, settings=edit.settings) == edit.record
    assert edit.with_settings(strength=0.0).settings.strength == 0
    assert edit.with_settings().record == edit.record
    assert (repr(edit.record), edit.hash) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"combine": "bth"}, r"unknown combination 'bth' \(did you mean 'both'\?\)"),
        ({"normalization": "tokens"}, r"unknown normalization 'tokens' \(did you mean 'token'\?\)"),
        ({"strength": float("nan")}, r"strength is nan, but it must be finite; try a value in \[0, 1\]"),
        ({"strength": float("-inf")}, "strength is -inf, but it must be finite"),
    ],
)
def test_settings_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make_edit().with_settings(**change)


def test_some_layers_only() -> None:
    edit = make_edit()
    one = edit.with_layers([3])
    assert one.layers == [3]
    assert one.modules == ["model.layers.3.mlp"]
    assert one.projections[3] is edit.projections[3]
    assert one.record.layers == {"3": edit.record.layers["3"]}
    both = edit.with_layers([3, 1, 3])
    assert_same(both, edit)
    assert list(both.record.layers) == ["1", "3"]
    assert edit.layers == [1, 3]


def test_layers_that_are_refused() -> None:
    for layers, named in (([0, 1], [0]), ([-1], [-1]), ([9, 3, 2], [9, 2])):
        message = rf"layers \[{', '.join(map(str, named))}\] are not in the edit, which has layers \[1, 3\]"
        with pytest.raises(SiteError, match=message):
            make_edit().with_layers(layers)
    with pytest.raises(SiteError, match=r"no layers are named, but an edit needs at least 1; it has layers \[1, 3\]"):
        make_edit().with_layers([])


def test_layers_are_ordered_by_number_not_by_name(tmp_path: Path) -> None:
    edit = make_edit()
    entries = {"10": edit.record.layers["1"], "9": edit.record.layers["3"]}
    record = dataclasses.replace(edit.record, layers=entries)
    swapped = Edit({10: edit.projections[1], 9: edit.projections[3]}, record)
    swapped.save_pretrained(tmp_path / "edit")
    for one in (swapped, Edit.from_pretrained(tmp_path / "edit")):
        assert one.layers == [9, 10]
        assert one.modules == ["model.layers.3.mlp", "model.layers.1.mlp"]


def test_the_random_control() -> None:
    edit = make_edit(torch.float64, centered=True)
    control = edit.randomized(2)
    assert control.record is edit.record
    assert control.layers == edit.layers
    for layer, projection in control.projections.items():
        original = edit.projections[layer]
        for name in ("positive", "negative"):
            factor, old = getattr(projection, name), getattr(original, name)
            assert factor.shape == old.shape
            torch.testing.assert_close(factor.T @ factor, torch.eye(factor.shape[1], dtype=torch.float64))
            # A random subspace of k of 11 directions is far from the fitted one.
            assert float((factor.T @ old).square().sum()) < 0.9 * factor.shape[1]
        assert projection.mean is original.mean
    alike = dataclasses.replace(edit, projections=dict.fromkeys((1, 3), edit.projections[1])).randomized(2)
    assert not torch.equal(alike.projections[1].positive, alike.projections[3].positive)
    assert_same(edit.randomized(2), control)
    assert len({edit.hash, control.hash, edit.randomized(3).hash, edit.randomized(0).hash}) == 4


def variants(base: Edit) -> Sequence[Edit]:
    """Edits that differ from one another in one thing that changes what they do."""
    edits = [base.with_settings(combine=name) for name in COMBINES if name != base.settings.combine]  # type: ignore[arg-type]
    edits += [
        base.with_settings(normalization=name)  # type: ignore[arg-type]
        for name in NORMALIZATIONS
        if name != base.settings.normalization
    ]
    edits += [base.with_settings(strength=value) for value in (0.0, 0.7000000000000001, 1.0)]
    edits += [base.with_layers([1]), base.with_layers([3]), base.randomized(0)]
    for changes in ({"site": "residual"}, {"feature_map": "tanh"}, {"centered": True}):
        edits.append(make_edit(**changes))
    nudged = base.projections[3].negative.clone()
    nudged[0, 0] = torch.nextafter(nudged[0, 0], torch.tensor(9.0))
    projections = dict(base.projections) | {3: dataclasses.replace(base.projections[3], negative=nudged)}
    edits.append(dataclasses.replace(base, projections=projections))
    moved = dataclasses.replace(base.record.layers["1"], module="model.layers.2.mlp")
    layers = dict(base.record.layers) | {"1": moved}
    edits.append(dataclasses.replace(base, record=dataclasses.replace(base.record, layers=layers)))
    return edits


def test_hash_changes_with_whatever_changes_the_edit() -> None:
    base = make_edit()
    edits = [base, *variants(base)]
    assert len({edit.hash for edit in edits}) == len(edits)
    assert make_edit().hash == base.hash


def test_hash_does_not_change_with_the_story_of_the_edit() -> None:
    base = make_edit()
    record: EditRecord = dataclasses.replace(
        base.record, fit={}, demonstrations_count=9, versions={}, tensors_hash="ee" * 32
    )
    assert dataclasses.replace(base, record=record).hash == base.hash


def test_whole_numbers_for_strength_are_the_same_edit(tmp_path: Path) -> None:
    whole = make_edit().with_settings(strength=1)
    assert whole.hash == make_edit().with_settings(strength=1.0).hash
    whole.save_pretrained(tmp_path / "edit")
    assert Edit.from_pretrained(tmp_path / "edit").hash == whole.hash


class FakeApi:
    """Stands for the Hub's client; keeps what it is told and what the folder held."""

    calls: list[tuple[Any, ...]]
    uploaded: dict[str, bytes]

    def __init__(self, token: str | None = None) -> None:
        type(self).calls = [("token", token)]

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self.calls.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        self.calls.append(("upload", repo_id, commit_message))
        type(self).uploaded = contents(Path(folder_path))
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")


def test_push_to_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    edit = Edit.from_pretrained(folder)
    assert edit.push_to_hub("me/mine") == "https://huggingface.co/me/mine/commit/1"
    assert FakeApi.calls == [
        ("token", None),
        ("create", "me/mine", False, True),
        ("upload", "me/mine", "Upload Sealign edit"),
    ]
    assert FakeApi.uploaded == contents(folder)
    edit.push_to_hub("me/mine", private=True, token="hf_x")
    assert FakeApi.calls[:2] == [("token", "hf_x"), ("create", "me/mine", True, True)]


def test_from_a_repository(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repo_id, revision, sorted(allow_patterns)))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert_same(Edit.from_pretrained("me/mine", revision="v1"), make_edit(centered=True))
    assert calls == [("me/mine", "v1", FILES)]
    (folder / "edit.json").unlink()
    with pytest.raises(EditFileError, match=r"has no edit\.json, so it is not an edit"):
        Edit.from_pretrained("me/mine")


def test_a_repository_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise ConnectionError("many lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    message = r"'me/mine' is neither a folder nor a repository .*\(ConnectionError\); check the name and the network"
    with pytest.raises(EditFileError, match=message):
        Edit.from_pretrained("me/mine")


def test_the_record_is_written_as_it_is(folder: Path) -> None:
    loaded = Edit.from_pretrained(folder)
    assert (folder / "edit.json").read_text() == dump_record(loaded.record)
    assert loaded.record.tensors_hash == tensors_hash(read_tensors(folder / "edit.safetensors"))
