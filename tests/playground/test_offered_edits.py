from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import sealign
from sealign.errors import EditFileError, FingerprintError, SettingError
from sealign.methods.composition import Composition
from sealign.playground.offered_edits import OfferedEdits
from tests.conftest import our_hooks
from tests.tiny_models import build_model


@pytest.fixture
def shift(llama: Any, tokenizer: Any, demonstrations: Any) -> sealign.Edit:
    config = sealign.MeanDifferenceConfig(site="residual", layers=(1, 2), strength=2.5)
    return sealign.fit_edit(llama, tokenizer, demonstrations, config=config)


@pytest.fixture
def folder(tmp_path: Path, small_edit: sealign.Edit, shift: sealign.Edit) -> Path:
    small_edit.save_pretrained(tmp_path / "edits" / "mild")
    shift.save_pretrained(tmp_path / "edits" / "deep" / "shift")
    small_edit.save_pretrained(tmp_path / "outside")
    (tmp_path / "edits" / "link").symlink_to(tmp_path / "outside")
    return tmp_path / "edits"


def test_what_the_page_is_told(llama: Any, tokenizer: Any, small_edit: sealign.Edit, shift: sealign.Edit) -> None:
    offered = OfferedEdits(llama, tokenizer, {"mild": small_edit, "shift": shift})
    mild, other = (one.describe() for one in offered.initial)
    assert mild == {
        "name": "mild",
        "method": "sea",
        "site": "mlp",
        "layers": [1, 3],
        "strength": 0.7,
        "slider": 2.8,
        "max_strength": 1000.0,
        "remarks": [],
    }
    assert (other["site"], other["layers"], other["slider"]) == ("residual", [1, 2], 10.0)
    assert our_hooks(llama) == 0


def test_combining(llama: Any, tokenizer: Any, small_edit: sealign.Edit, shift: sealign.Edit) -> None:
    offered = OfferedEdits(llama, tokenizer, {"mild": small_edit, "shift": shift})
    assert offered.combine([]) == (None, [])
    one, remarks = offered.combine([("mild", 0.5)])
    assert one is not None
    assert (one.hash, remarks) == (small_edit.with_strength(0.5).hash, [])
    both, remarks = offered.combine([("shift", -1), ("mild", 3)])
    assert both is not None
    assert both.hash == Composition([shift.with_strength(-1), small_edit.with_strength(3)]).hash
    assert [remark.partition(", ")[0] for remark in remarks] == ["shift: strength is -1", "mild: strength is 3"]
    # What a request combines is nobody else's.
    again, _ = offered.combine([("mild", small_edit.strength)])
    assert again is not None
    assert again.hash == small_edit.hash


@pytest.mark.parametrize(
    ("strengths", "words"),
    [
        ([("mlid", 1.0)], r"unknown edit 'mlid' \(did you mean 'mild'\?\)"),
        ([("mild", 1.0), ("mild", 2.0)], "'mild' is given twice"),
        ([("mild", None)], "strength of the edit 'mild' is missing"),
        ([("mild", 1000.5)], r"must be in \[-1000, 1000\]"),
        ([("mild", float("nan"))], "must be finite"),
        ([("dola", 1.0)], "dola has no strength"),
    ],
)
def test_combinations_that_are_refused(
    llama: Any, tokenizer: Any, small_edit: sealign.Edit, demonstrations: Any, strengths: Any, words: str
) -> None:
    dola = sealign.fit_edit(llama, tokenizer, demonstrations, config=sealign.DoLaConfig())
    offered = OfferedEdits(llama, tokenizer, {"mild": small_edit, "dola": dola})
    with pytest.raises(SettingError, match=words):
        offered.combine(strengths)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (sealign.ICLConfig(), "puts demonstrations before each prompt"),
        (sealign.BestOfNConfig(), "chooses among complete answers"),
    ],
    ids=["icl", "best_of_n"],
)
def test_methods_that_a_conversation_does_not_support(
    llama: Any, tokenizer: Any, demonstrations: Any, config: Any, words: str
) -> None:
    edit = sealign.fit_edit(llama, tokenizer, demonstrations, config=config)
    with pytest.raises(SettingError, match=f"edit 'other' .* {words}.*; use sealign generate"):
        OfferedEdits(llama, tokenizer, {"other": edit})


def test_an_edit_of_another_model(llama: Any, tokenizer: Any, small_edit: sealign.Edit) -> None:
    other = build_model("llama", vocab_size=len(tokenizer), num_key_value_heads=4)
    with pytest.raises(FingerprintError):
        OfferedEdits(other, tokenizer, {"mild": small_edit})
    OfferedEdits(other, tokenizer, {"mild": small_edit}, ignore_mismatch=True)
    tuned, words = copy.deepcopy(llama), copy.deepcopy(tokenizer)
    words.chat_template += " "
    with torch.no_grad():
        tuned.lm_head.weight[0] += 1
    (offered,) = OfferedEdits(tuned, words, {"mild": small_edit}).initial
    assert ["other weights" in offered.remarks[1], "other chat template" in offered.remarks[0]] == [True, True]
    (silent,) = OfferedEdits(tuned, words, {"mild": small_edit}, ignore_mismatch=True).initial
    assert silent.remarks == ()


def test_loading_from_the_folder(llama: Any, tokenizer: Any, folder: Path, shift: sealign.Edit) -> None:
    offered = OfferedEdits(llama, tokenizer, {}, folder=folder)
    assert offered.folders() == ["deep/shift", "mild"]
    loaded = offered.load("deep/shift")
    assert (loaded.name, loaded.edit.hash) == ("/deep/shift", shift.hash)
    assert offered.load(str(folder / "mild")).name == "/mild"
    assert offered.initial == []
    edit, _ = offered.combine([("/deep/shift", 1.0)])
    assert edit is not None
    # An edit that was fitted again is loaded again.
    shift.with_strength(0.3).save_pretrained(folder / "mild", overwrite=True)
    assert offered.load("mild").edit.strength == 0.3


@pytest.mark.parametrize("path", ["../outside", "link", "/", "..", "mild/../../outside", "~"])
def test_paths_outside_the_folder(llama: Any, tokenizer: Any, folder: Path, path: str) -> None:
    offered = OfferedEdits(llama, tokenizer, {}, folder=folder)
    given = str(folder.parent / "outside") if path == "/" else path
    with pytest.raises((SettingError, EditFileError), match="outside the folder of --edits-dir|there is no edit '~'"):
        offered.load(given)
    with pytest.raises(SettingError, match="unknown edit"):
        offered.combine([(given, 1.0)])


@pytest.mark.parametrize("path", ["a\0b", "circle/mild", "x" * 999])
def test_what_is_no_path(llama: Any, tokenizer: Any, folder: Path, path: str) -> None:
    (folder / "circle").symlink_to(folder / "circle")
    with pytest.raises((SettingError, EditFileError), match="is not a path|there is no edit"):
        OfferedEdits(llama, tokenizer, {}, folder=folder).load(path)


def test_a_path_without_an_edit(llama: Any, tokenizer: Any, folder: Path) -> None:
    with pytest.raises(EditFileError, match="there is no edit 'deep' in the folder of --edits-dir, which holds: deep"):
        OfferedEdits(llama, tokenizer, {}, folder=folder).load("deep")
    closed = OfferedEdits(llama, tokenizer, {})
    assert closed.folders() is None
    with pytest.raises(SettingError, match="start it again with --edits-dir DIR"):
        closed.load("mild")
