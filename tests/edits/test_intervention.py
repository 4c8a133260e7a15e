"""What all interventions share, on one that does nothing; saving, loading and uploading."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
import torch
from torch import Tensor

import sealign
from sealign.edits.edit import Edit
from sealign.edits.edit_files import read_edit_files
from sealign.edits.handle import EditHandle
from sealign.edits.intervention import Intervention
from sealign.edits.record import EditRecord
from sealign.errors import EditFileError, SettingError
from sealign.files import read_tensors, tensors_hash
from sealign.record_files import write_record
from tests.edits.edit_data import contents, make_affine, make_edit, make_record

FILES = ["README.md", "edit.json", "edit.safetensors"]
NAN_EDIT = make_affine(rank=3, scale=-0.5, normalization="token", dtype=torch.float32)
NAN_EDIT.left[0, 0] = float("nan")


@dataclass(frozen=True, eq=False, repr=False)
class Note(Intervention):
    """An intervention with a tensor, which is never used."""

    record: EditRecord

    @classmethod
    def from_record(cls, record: EditRecord, tensors: Mapping[str, Tensor], *, place: str = "edit") -> Self:
        return cls(record)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": torch.ones(2)}

    def install(self, model: Any, handle: EditHandle) -> None:
        handle.stack.callback(lambda: None)


def make_note(**changes: Any) -> Note:
    return Note(make_record(**({"method": "note", "site": None, "layers": {}} | changes)))


def test_properties_of_an_intervention_that_does_nothing_in_particular() -> None:
    note = make_note(strength=None, config={"shots": 2}, learned={"prefix": "x"})
    assert (note.method, note.strength, note.fit_seconds, note.prefix, note.modules) == ("note", None, 2.5, "", [])
    assert note.settings == {"shots": 2, "prefix": "x"}
    assert note.base_model is note.record.model
    assert (note.is_causal, note.changes_scores, note.has_own_cache) == (True, True, False)
    assert note.parts == (note,)
    assert note.randomized(0) is None
    assert note.reversed() is None


def test_with_strength() -> None:
    note = make_note(strength=1.0)
    stronger = note.with_strength(2)
    assert isinstance(stronger, Note)
    assert repr(stronger.strength) == "2.0"
    assert dataclasses.replace(stronger.record, strength=1.0) == note.record
    assert note.strength == 1.0
    with pytest.raises(SettingError, match="strength is nan, but it must be finite"):
        note.with_strength(float("nan"))
    with pytest.raises(SettingError, match=r"strength is 0.5, but note has no strength; leave it out"):
        make_note(strength=None).with_strength(0.5)


def test_hash() -> None:
    """Of the method, its settings, the base model, strength and tensors; not of provenance."""
    note = make_note(strength=1.0, config={"a": 1, "b": 2})
    parts = ["note", [{"a": 1, "b": 2}, note.base_model.fingerprint], 1.0, tensors_hash(note.tensors())]
    assert note.hash == hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    assert note.hash == make_note(strength=1.0, config={"b": 2, "a": 1}, versions={}, fitted_on=["0" * 33]).hash
    others = [
        make_note(strength=0.5, config={"a": 1, "b": 2}),
        make_note(strength=1.0, config={"a": 1, "b": 3}),
        make_note(strength=1.0, config={"a": 1, "b": 2}, learned={"c": 1}),
        make_note(strength=1.0, config={"a": 1, "b": 2}, method="other"),
    ]
    assert len({other.hash for other in [note, *others]}) == 5


def test_representation() -> None:
    note = make_note(strength=None)
    assert repr(note) == "Note(method='note', model='owner/tiny-llama')"
    assert repr(make_note(strength=0.5)) == "Note(method='note', model='owner/tiny-llama', strength=0.5)"
    edit = make_edit()
    assert repr(edit) == (
        "Edit(method='sea', model='owner/tiny-llama', site='mlp', layers='1, 3', rank=5, strength=0.7)"
    )


class Cells(HTMLParser):
    """Collects the text of an HTML table and checks that its tags match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


def test_representation_in_a_notebook() -> None:
    edit = make_edit(model=dataclasses.replace(make_record().model, id="<b>&model"))
    expected = ["Edit", "method", "sea", "model", "<b>&model", "site", "mlp", "layers", "1, 3", "rank", "5"]
    expected += ["strength", "0.7"]
    assert Cells(edit._repr_html_()).cells == expected
    assert "strength" not in make_note(strength=None)._repr_html_()


def test_saving(tmp_path: Path) -> None:
    note = make_note(tensors_hash="")
    note.save_pretrained(tmp_path / "a" / "note")
    folder = tmp_path / "a" / "note"
    assert list(contents(folder)) == FILES
    record, tensors = read_edit_files(folder)
    assert record == dataclasses.replace(note.record, tensors_hash=tensors_hash(note.tensors()))
    assert list(tensors) == ["weight"]
    assert (folder / "edit.json").read_text() == write_record(record)
    assert record.tensors_hash == tensors_hash(read_tensors(folder / "edit.safetensors"))


def test_equal_edits_are_saved_as_equal_files(tmp_path: Path) -> None:
    make_edit(center=True).save_pretrained(tmp_path / "first")
    make_edit(center=True).save_pretrained(tmp_path / "again")
    Edit.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "copy")
    assert contents(tmp_path / "first") == contents(tmp_path / "again") == contents(tmp_path / "copy")


def test_an_edit_replaces_an_edit(tmp_path: Path) -> None:
    make_edit(center=True).save_pretrained(tmp_path / "edit")
    other = make_edit(strength=0.2).with_layers([3])
    with pytest.raises(EditFileError, match="exists already, and is replaced only with --overwrite"):
        other.save_pretrained(tmp_path / "edit")
    other.save_pretrained(tmp_path / "edit", overwrite=True)
    assert list(contents(tmp_path / "edit")) == FILES
    assert Edit.from_pretrained(tmp_path / "edit").hash == other.hash
    assert [path.name for path in tmp_path.iterdir()] == ["edit"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make_edit().save_pretrained(tmp_path / "empty")
    assert list(contents(tmp_path / "empty")) == FILES


def test_what_is_not_an_edit_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(EditFileError, match="thesis' is not empty and has no edit.json written by Sealign"):
        make_edit().save_pretrained(tmp_path / "thesis")
    with pytest.raises(EditFileError, match=r"chapter\.tex' is a file, but the output is a folder"):
        make_edit().save_pretrained(tmp_path / "thesis" / "chapter.tex")
    assert contents(tmp_path / "thesis") == {"chapter.tex": b"x"}
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


def test_a_full_disk_leaves_the_old_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    make_edit(center=True).save_pretrained(tmp_path / "edit")
    before = contents(tmp_path / "edit")
    monkeypatch.setattr("sealign.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        make_edit(strength=0.2).save_pretrained(tmp_path / "edit", overwrite=True)
    assert contents(tmp_path / "edit") == before
    assert [path.name for path in tmp_path.iterdir()] == ["edit"]


def test_what_cannot_be_read_back_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        make_note(strength=float("nan")).save_pretrained(tmp_path / "note")
    assert list(tmp_path.iterdir()) == []


def test_an_edit_that_would_be_read_as_another_is_not_saved(tmp_path: Path) -> None:
    """Scale and rescaling are saved in the record, which must agree with the layers."""
    edit = make_edit()
    wrong = [
        {1: dataclasses.replace(edit.affine_edits[1], scale=0.25), 3: edit.layer_edits[3]},
        {layer: dataclasses.replace(found, normalization="none") for layer, found in edit.layer_edits.items()},
    ]
    for layer_edits in wrong:
        with pytest.raises(SettingError, match="the record does not describe this sea edit, which would be another"):
            dataclasses.replace(edit, layer_edits=layer_edits).save_pretrained(tmp_path / "edit")
    for layer_edits in ({1: edit.layer_edits[3], 3: edit.layer_edits[3]}, {1: edit.layer_edits[1], 3: NAN_EDIT}):
        with pytest.raises(EditFileError, match=r"edit': layer [13]: tensor"):
            dataclasses.replace(edit, layer_edits=layer_edits).save_pretrained(tmp_path / "edit")
    assert list(tmp_path.iterdir()) == []


class FakeApi:
    """Stands for the client of the Hub; keeps its calls and the contents of the uploaded folder."""

    calls: list[tuple[Any, ...]]
    uploaded: dict[str, bytes]

    def __init__(self, token: str | None = None) -> None:
        type(self).calls = [("token", token)]

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self.calls.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str) -> Any:
        assert allow_patterns == ["edit.json", "edit.safetensors", "README.md"]
        self.calls.append(("upload", repo_id, commit_message))
        type(self).uploaded = contents(Path(folder_path))
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")


def test_push_to_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_login")
    make_edit(center=True).save_pretrained(tmp_path / "edit")
    edit = Edit.from_pretrained(tmp_path / "edit")
    assert edit.push_to_hub("me/mine") == "https://huggingface.co/me/mine/commit/1"
    assert FakeApi.calls == [
        ("token", None),
        ("create", "me/mine", False, True),
        ("upload", "me/mine", "Upload Sealign edit"),
    ]
    assert FakeApi.uploaded == contents(tmp_path / "edit")
    edit.push_to_hub("me/mine", private=True, token="hf_x")
    assert FakeApi.calls[:2] == [("token", "hf_x"), ("create", "me/mine", True, True)]


def test_methods_that_do_not_edit_activations(
    llama: Any, tokenizer: Any, demonstrations: list[sealign.Demonstration], tmp_path: Path
) -> None:
    """Edit refuses them and names the function that loads any method."""
    fitted = sealign.fit_edit(llama, tokenizer, demonstrations, config=sealign.ICLConfig(shots=2))
    fitted.save_pretrained(tmp_path / "icl")
    message = rf"'{re.escape(str(tmp_path / 'icl'))}': 'icl' does not edit activations; load it with sealign.load_edit"
    with pytest.raises(EditFileError, match=message):
        Edit.from_pretrained(tmp_path / "icl")
    loaded = sealign.load_edit(tmp_path / "icl")
    assert type(loaded) is type(fitted)
    assert (loaded.prefix, loaded.hash, loaded.record) == (fitted.prefix, fitted.hash, fitted.record)
    edit = make_edit()
    edit.save_pretrained(tmp_path / "edit")
    assert type(sealign.load_edit(tmp_path / "edit")) is Edit
    assert sealign.load_edit(str(tmp_path / "edit")).hash == edit.hash


def test_an_affine_edit_of_an_unknown_method_is_read(tmp_path: Path) -> None:
    edit = make_edit(method="someone_elses")
    edit.save_pretrained(tmp_path / "edit")
    assert sealign.load_edit(tmp_path / "edit").hash == edit.hash
    make_note(method="leac").save_pretrained(tmp_path / "note")
    with pytest.raises(EditFileError, match=r"note': unknown method 'leac' \(did you mean 'leace'\?\)"):
        sealign.load_edit(tmp_path / "note")
