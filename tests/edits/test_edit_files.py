"""Reading an edit: round trips to the bit, and every file that is not what was written is refused."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sealign.edits.edit import Edit
from sealign.errors import EditFileError
from sealign.files import read_tensors, tensors_hash, write_tensors
from sealign.spectral.feature_maps import FEATURE_MAPS
from sealign.spectral.projection import COMBINES, NORMALIZATIONS
from tests.edits.edit_data import WIDTH, assert_same, contents, draw, make_edit

FILES = ["README.md", "edit.json", "edit.safetensors"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a saved affine edit with all of its parts."""
    make_edit(center=True, shift=True).save_pretrained(tmp_path / "edit")
    return tmp_path / "edit"


@pytest.fixture
def mapped(tmp_path: Path) -> Path:
    """The folder of a saved edit with a feature map."""
    make_edit(center=True, feature_map="tanh", combine="average").save_pretrained(tmp_path / "mapped")
    return tmp_path / "mapped"


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_round_trip_to_the_bit(tmp_path: Path, dtype: torch.dtype, center: bool, shift: bool, feature_map: str) -> None:
    edit = make_edit(dtype, center=center, shift=shift, feature_map=feature_map, combine="average", strength=0.1)
    edit.save_pretrained(tmp_path / "edit")
    back = Edit.from_pretrained(tmp_path / "edit")
    assert_same(edit, back)
    assert_same(edit, Edit.from_pretrained(str(tmp_path / "edit")))
    tokens = draw(2, 5, WIDTH, dtype=torch.float32)
    for layer in edit.layers:
        assert torch.equal(edit.layer_edits[layer](tokens, 0.3), back.layer_edits[layer](tokens, 0.3))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("combine", COMBINES)
def test_round_trip_of_settings(tmp_path: Path, normalization: str, combine: str) -> None:
    for feature_map in ("identity", "elu"):
        edit = make_edit(feature_map=feature_map, combine=combine, normalization=normalization, site="residual")
        edit.save_pretrained(tmp_path / feature_map)
        assert_same(edit, Edit.from_pretrained(tmp_path / feature_map))


def test_round_trip_of_a_fit(small_edit: Edit, tmp_path: Path) -> None:
    small_edit.save_pretrained(tmp_path / "a" / "edit")
    back = Edit.from_pretrained(tmp_path / "a" / "edit")
    assert_same(small_edit, back)
    # Nothing was saved that the fit had not recorded, the hash of the tensors included.
    assert back.record == small_edit.record
    assert back.layers == [1, 3]
    assert back.modules == ["model.layers.1.mlp", "model.layers.3.mlp"]
    assert len(back.hash) == 64


@pytest.mark.parametrize("feature_map", ["identity", "tanh"])
def test_files_hold_json_and_plain_numbers_only(tmp_path: Path, feature_map: str) -> None:
    edit = make_edit(center=True, shift=True, feature_map=feature_map)
    edit.save_pretrained(tmp_path)
    assert list(contents(tmp_path)) == FILES
    record = json.loads((tmp_path / "edit.json").read_text())
    assert (record["format"], record["method"]) == ("sealign.edit", "sea")
    # The layout of safetensors, read by hand: length of a JSON header, header, little-endian numbers.
    data = (tmp_path / "edit.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, numbers = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = ["left", "right", "shift", "center"] if feature_map == "identity" else ["positive", "negative", "mean"]
    assert set(header) == {f"layers.{layer}.{name}" for layer in (1, 3) for name in names}
    assert sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values()) == len(numbers)
    for layer in (1, 3):
        found: Any = edit.layer_edits[layer]
        for name in names:
            tensor = getattr(found if feature_map == "identity" else found.projection, name)
            entry = header[f"layers.{layer}.{name}"]
            start, end = entry["data_offsets"]
            assert entry["dtype"] == "F32"
            assert entry["shape"] == list(tensor.shape)
            assert struct.unpack(f"<{tensor.numel()}f", numbers[start:end]) == tuple(tensor.flatten().tolist())


def test_factors_that_share_memory_or_are_not_contiguous_are_saved(tmp_path: Path) -> None:
    edit, block = make_edit(), draw(WIDTH, 16, dtype=torch.float32)
    shared = {
        1: dataclasses.replace(edit.affine_edits[1], left=block[:, :5], right=block[:, 5:10].T),
        3: dataclasses.replace(edit.affine_edits[3], left=block[:, 10:13], right=block[:, 10:13].T, shift=block[:, 1]),
    }
    edit = dataclasses.replace(edit, layer_edits=shared)
    edit.save_pretrained(tmp_path / "edit")
    assert_same(edit, Edit.from_pretrained(tmp_path / "edit"))


def test_layers_are_ordered_by_number_not_by_name(tmp_path: Path) -> None:
    edit = make_edit()
    entries = {"10": edit.record.layers["1"], "9": edit.record.layers["3"]}
    record = dataclasses.replace(edit.record, layers=entries)
    swapped = Edit({10: edit.layer_edits[1], 9: edit.layer_edits[3]}, record)
    swapped.save_pretrained(tmp_path / "edit")
    loaded = Edit.from_pretrained(tmp_path / "edit")
    assert list(loaded.layer_edits) == [9, 10]
    for one in (swapped, loaded):
        assert one.layers == [9, 10]
        assert one.modules == ["model.layers.3.mlp", "model.layers.1.mlp"]


def test_a_loaded_edit_outlives_its_folder(folder: Path) -> None:
    loaded = Edit.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in loaded.tensors().items()}
    make_edit(center=True, shift=True).randomized(3).save_pretrained(folder, overwrite=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.tensors().items())
    assert Edit.from_pretrained(folder).hash != loaded.hash


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


def test_rewriting_alone_is_not_refused(folder: Path, mapped: Path) -> None:
    rewrite(folder)
    rewrite(mapped)
    assert_same(Edit.from_pretrained(folder), make_edit(center=True, shift=True))
    assert_same(Edit.from_pretrained(mapped), make_edit(center=True, feature_map="tanh", combine="average"))


Change = Callable[[dict[str, Tensor]], object]


def put(name: str, value: Tensor) -> Change:
    return lambda tensors: tensors.update({name: value})


def drop(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


def poison(name: str, value: float) -> Change:
    return lambda tensors: tensors[name].view(-1)[-1:].fill_(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (poison("layers.1.left", float("nan")), "layer 1: tensor left holds NaN or infinity"),
        (poison("layers.3.right", float("inf")), "layer 3: tensor right holds NaN or infinity"),
        (poison("layers.3.center", float("-inf")), "layer 3: tensor center holds NaN or infinity"),
        (poison("layers.1.shift", float("nan")), "layer 1: tensor shift holds NaN or infinity"),
        (
            put("layers.1.center", torch.zeros(WIDTH, dtype=torch.int64)),
            "layer 1: tensor center has type torch.int64, but must have a floating-point type",
        ),
        (
            put("layers.1.shift", torch.zeros(WIDTH, dtype=torch.float8_e4m3fn)),
            "layer 1: tensor shift has type torch.float8_e4m3fn, but must have a floating-point type",
        ),
        (
            put("layers.1.left", torch.zeros(WIDTH, 4)),
            r"layer 1: tensor left has shape \(11, 4\), but must have \(11, 5\)",
        ),
        (
            put("layers.1.left", torch.zeros(5, WIDTH)),
            r"layer 1: tensor left has shape \(5, 11\), but must have \(5, 5\)",
        ),
        (
            put("layers.3.right", torch.zeros(3, 10)),
            r"layer 3: tensor right has shape \(3, 10\), but must have \(3, 11\)",
        ),
        (put("layers.3.right", torch.zeros(33)), r"layer 3: tensor right has shape \(33,\), but must have \(3, 11\)"),
        (put("layers.1.left", torch.zeros(())), r"layer 1: tensor left has shape \(\), but must have \(0, 5\)"),
        (put("layers.1.center", torch.zeros(1)), r"layer 1: tensor center has shape \(1,\), but must have \(11,\)"),
        (
            put("layers.3.shift", torch.zeros(WIDTH, 1)),
            r"layer 3: tensor shift has shape \(11, 1\), but must have \(11,\)",
        ),
        (drop("layers.1.left"), r"layer 1: missing tensors: \['left'\], unknown tensors: none"),
        (drop("layers.3.right"), r"layer 3: missing tensors: \['right'\], unknown tensors: none"),
        (put("layers.1.bias", torch.zeros(WIDTH)), r"layer 1: missing tensors: none, unknown tensors: \['bias'\]"),
        (put("layers.7.left", torch.zeros(WIDTH, 1)), "tensor layers.7.left is not in the record"),
        (put("layers.11.left", torch.zeros(WIDTH, 5)), "tensor layers.11.left is not in the record"),
        (put("down_proj.weight", torch.zeros(2, 3)), "tensor down_proj.weight is not in the record"),
    ],
)
def test_tensors_that_do_not_fit_the_record(folder: Path, change: Change, message: str) -> None:
    rewrite(folder, tensors=change)
    with pytest.raises(EditFileError, match=f"edit': {message}; copy or download the edit again"):
        Edit.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (poison("layers.1.positive", float("nan")), "layer 1: tensor positive holds NaN or infinity"),
        (poison("layers.3.mean", float("inf")), "layer 3: tensor mean holds NaN or infinity"),
        (
            put("layers.1.positive", torch.zeros(WIDTH)),
            r"layer 1: tensor positive has shape \(11,\), but must have \(11, 3\)",
        ),
        (
            put("layers.1.positive", torch.zeros(WIDTH, 2)),
            r"layer 1: tensor positive has shape \(11, 2\), but must have \(11, 3\)",
        ),
        (
            put("layers.3.negative", torch.zeros(WIDTH - 1, 2)),
            r"layer 3: tensor negative has shape \(10, 2\), but must have \(11, 2\)",
        ),
        (put("layers.1.mean", torch.zeros(1)), r"layer 1: tensor mean has shape \(1,\), but must have \(11,\)"),
        (drop("layers.1.negative"), r"layer 1: missing tensors: \['negative'\], unknown tensors: none"),
        (put("layers.1.left", torch.zeros(WIDTH, 5)), r"layer 1: missing tensors: none, unknown tensors: \['left'\]"),
    ],
)
def test_tensors_of_a_feature_map_that_do_not_fit_the_record(mapped: Path, change: Change, message: str) -> None:
    rewrite(mapped, tensors=change)
    with pytest.raises(EditFileError, match=f"mapped': {message}; copy or download the edit again"):
        Edit.from_pretrained(mapped)


CHANGED = "it was changed by hand or by another program, copy or download it again"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("normalization", "l2", r"edit': unknown normalization 'l2'; choose one of: token"),
        ("feature_map", "tahn", r"edit': unknown feature map 'tahn' \(did you mean 'tanh'\?\)"),
        ("feature_map", "tanh", r"edit': unknown combination ''; choose one of: both"),
        ("site", "mpl", r"edit': unknown site 'mpl' \(did you mean 'mlp'\?\); choose one of: mlp, att"),
        ("site", None, "edit': 'sea' does not edit activations; load it with sealign.load_edit"),
        ("site", 3, f"edit.json' has 3 at key 'site', which must be a valid string; {CHANGED}"),
        ("strength", None, "edit': 'sea' edits activations, but has no strength; fit the edit again"),
        ("strength", "1", f"edit.json' has '1' at key 'strength', which must be a valid number; {CHANGED}"),
        ("strength", 1e30, r"edit': strength is 1e\+30, but it must be in \[-1000, 1000\]; try a value in"),
        ("layers.1.scale", -1e30, r"edit': layer 1: scale is -1e\+30, but it must be in \[-1000, 1000\]; copy or"),
        ("strength", float("inf"), "edit.json' has .* at key 'strength'.*finite"),
        ("strength", float("nan"), "edit.json' has .* at key 'strength'.*finite"),
        ("layers.1.scale", float("nan"), "edit.json' has .* at key 'layers.1.scale'.*finite"),
        ("layers.1.rank", 4, r"layer 1: tensor left has shape \(11, 5\), but must have \(11, 4\)"),
        ("layers.3.rank", -3, r"layer 3: tensor left has shape \(11, 3\), but must have \(11, -3\)"),
        (
            "layers.1.groups",
            [4, 2],
            r"layer 1: groups is \(4, 2\), but it must be positive numbers.* the rank, 5; copy",
        ),
        (
            "layers.1.groups",
            [5, 0],
            r"layer 1: groups is \(5, 0\), but it must be positive numbers.* the rank, 5; copy",
        ),
        ("layers.1.groups", [3, 2.5], f"has 2.5 at key 'layers.1.groups.1', which must be a valid integer; {CHANGED}"),
        ("layers.3.rank", 3.5, f"has 3.5 at key 'layers.3.rank', which must be a valid integer; {CHANGED}"),
        ("layers.3.module", None, f"has None at key 'layers.3.module', which must be a valid string; {CHANGED}"),
        ("layers", {}, "edit': 'sea' edits activations, but has no layers; fit the edit again"),
        ("tensors_hash", "", "do not match their hash in edit.json; copy or download the edit again"),
        ("format_version", 99, "has format version 99, but this version of Sealign reads version 3; upgrade sealign"),
        ("format_version", 1, "has format version 1, but .* reads version 3; fit it again"),
        ("surprise", 1, f"has an unknown key 'surprise'; {CHANGED}"),
        ("layers.1.surprise", 1, f"has an unknown key 'layers.1.surprise'; {CHANGED}"),
        ("model.surprise", 1, f"has an unknown key 'model.surprise'; {CHANGED}"),
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


@pytest.mark.parametrize("groups", [[], [5], [3, 1], [2, 3], [3, 1, 1]])
def test_groups_that_do_not_fit_a_feature_map(mapped: Path, groups: list[int]) -> None:
    rewrite(mapped, record=lambda data: data["layers"]["1"].update(groups=groups))
    with pytest.raises(EditFileError, match=r"mapped': layer 1: (groups is .* the rank, 5|tensor positive has shape)"):
        Edit.from_pretrained(mapped)


@pytest.mark.parametrize("feature_map", ["identity", "tanh"])
def test_a_loaded_edit_has_the_same_random_control(tmp_path: Path, feature_map: str) -> None:
    edit = make_edit(feature_map=feature_map)
    edit.save_pretrained(tmp_path / "edit")
    assert_same(Edit.from_pretrained(tmp_path / "edit").randomized(3), edit.randomized(3))


def test_an_unknown_combination(mapped: Path) -> None:
    rewrite(mapped, record=lambda data: data.update(combine="bth"))
    with pytest.raises(EditFileError, match=r"mapped': unknown combination 'bth' \(did you mean 'both'\?\)"):
        Edit.from_pretrained(mapped)


@pytest.mark.parametrize("name", ["01", "-1", "+3", "one", "1.0", "", "\u0663", "1 ", "\u00b2"])
def test_layers_must_be_whole_numbers(folder: Path, name: str) -> None:
    rewrite(folder, record=lambda data: data["layers"].update({name: data["layers"].pop("3")}))
    with pytest.raises(EditFileError, match=r"edit': layer '.*' is not a whole number; copy or download"):
        Edit.from_pretrained(folder)


def test_a_record_with_a_layer_more_or_less(folder: Path) -> None:
    rewrite(folder, record=lambda data: data["layers"].update({"2": data["layers"]["1"]}))
    with pytest.raises(EditFileError, match=r"layer 2: missing tensors: \['left', 'right'\]"):
        Edit.from_pretrained(folder)
    rewrite(folder, record=lambda data: (data["layers"].pop("2"), data["layers"].pop("1")))
    with pytest.raises(EditFileError, match=r"tensor layers.1.center is not in the record"):
        Edit.from_pretrained(folder)


def test_missing_folders_and_files(folder: Path, tmp_path: Path) -> None:
    for place in ("nowhere", str(tmp_path / "nowhere"), "./owner/name", "~/edit"):
        with pytest.raises(EditFileError, match=f"there is no folder '{place}'; check the path, or give a repository"):
            Edit.from_pretrained(place)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EditFileError, match=r"empty' has no edit\.json, so it is not an edit; check the path"):
        Edit.from_pretrained(tmp_path / "empty")
    (folder / "README.md").unlink()  # which is for people only
    Edit.from_pretrained(folder)
    (folder / "edit.safetensors").unlink()
    with pytest.raises(EditFileError, match=r"there is no file '.*edit\.safetensors'"):
        Edit.from_pretrained(folder)
    (folder / "edit.json").unlink()
    with pytest.raises(EditFileError, match=r"has no edit\.json"):
        Edit.from_pretrained(folder)
    (tmp_path / "file").write_text("x")
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
    make_edit(center=True).save_pretrained(folder)
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


def test_from_a_repository(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repo_id, revision, sorted(allow_patterns)))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert_same(Edit.from_pretrained("me/mine", revision="v1"), make_edit(center=True, shift=True))
    ((repository, revision, patterns),) = calls
    assert (repository, revision) == ("me/mine", "v1")
    assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in FILES)
    assert not any(fnmatch("model.safetensors", pattern) for pattern in patterns)
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
