"""Which edits can be exported at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sealign
from sealign.edits.feature_map_edit import FeatureMapEdit
from sealign.errors import EditFileError, ExportError
from sealign.export.requirements import check_exportable, is_shift, load_single_edit
from tests.export.made_edits import affine, edit_of, random_edit


def test_a_rescaled_edit_is_exported_approximately_only(llama: Any, tokenizer: Any) -> None:
    edit = random_edit(llama, tokenizer, normalization="token")
    with pytest.raises(
        ExportError, match=r"rescaled per token, which is not linear.*pass --approximate.*sealign serve"
    ):
        check_exportable(edit, approximate=False)
    check_exportable(edit, approximate=True)
    check_exportable(edit.with_normalization("none"))
    with pytest.raises(ExportError, match="rescaled per feature") as raised:
        check_exportable(edit.with_normalization("feature"))
    assert "--approximate" not in str(raised.value)
    assert "sealign serve" not in str(raised.value)  # the server refuses an edit that is rescaled per feature
    assert "; apply it in Python with sealign.attach, or fit one with normalization=none" in str(raised.value)


def test_a_feature_map_is_never_exported(llama: Any, tokenizer: Any) -> None:
    projection = sealign.Projection(torch.eye(48)[:, :2], torch.eye(48)[:, 2:3], feature_map="tanh")
    edit = edit_of(llama, tokenizer, {1: FeatureMapEdit(projection)})
    with pytest.raises(ExportError, match="feature map 'tanh', which weights cannot compute; serve it with"):
        check_exportable(edit, approximate=True)


def test_pure_shifts() -> None:
    assert is_shift(sealign.AffineEdit.constant(torch.ones(4)))
    assert is_shift(sealign.AffineEdit(torch.zeros(4, 2), torch.ones(2, 4), shift=torch.ones(4)))
    assert not is_shift(sealign.AffineEdit(torch.zeros(4, 0), torch.zeros(0, 4), 0.5))
    assert not is_shift(affine(4, rank=1, shift=True))


def test_one_edit_at_a_strength(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    random_edit(llama, tokenizer).save_pretrained(tmp_path / "edit")
    assert load_single_edit(str(tmp_path / "edit")).strength == 0.6
    assert load_single_edit(str(tmp_path / "edit"), strength=0.25).strength == 0.25
    with pytest.raises(ExportError, match="names 2 edits, but only one can be exported"):
        load_single_edit(f"{tmp_path / 'edit'}+{tmp_path / 'edit'}")
    random_edit(llama, tokenizer).save_pretrained(tmp_path / "a+b")
    assert load_single_edit(str(tmp_path / "a+b")).layers == [1, 3]
    with pytest.raises(EditFileError):
        load_single_edit(str(tmp_path))
