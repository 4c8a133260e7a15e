"""An edit says so when it meets other weights, another vocabulary or another chat template."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import sealign
from sealign.edits.provenance import warn_of_other_tokenizer
from sealign.errors import SealignWarning
from sealign.evaluation.answers import compare_answers
from sealign.export.lora import export_lora, lora_factors
from sealign.export.merged import export_merged
from sealign.methods.composition import Composition
from sealign.models.loading import open_checkpoint
from tests.conftest import our_hooks

OTHER_WEIGHTS = (
    r"the edit was fitted on '.*', and this model has other weights, .*; load that model, or fit the edit again"
)


@pytest.fixture
def tuned(llama: Any) -> Any:
    """A fine-tuned model: one matrix is a little different."""
    tuned = copy.deepcopy(llama)
    with torch.no_grad():
        tuned.model.layers[2].mlp.up_proj.weight *= 1.01
    return tuned


def test_other_weights_are_said(llama: Any, tuned: Any, small_edit: sealign.Edit, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in (llama, copy.deepcopy(llama).bfloat16(), copy.deepcopy(tuned).half()):
            sealign.attach(same, small_edit).detach()
        sealign.attach(tuned, small_edit, ignore_mismatch=True).detach()
    with pytest.warns(SealignWarning, match=OTHER_WEIGHTS):
        sealign.attach(tuned, small_edit).detach()
    with warnings.catch_warnings():  # an error in place of the warning leaves nothing behind
        warnings.simplefilter("error")
        with pytest.raises(SealignWarning):
            sealign.attach(tuned, small_edit)
    assert our_hooks(tuned) == 0
    with pytest.warns(SealignWarning, match=OTHER_WEIGHTS):
        sealign.attach(tuned, Composition([small_edit])).detach()
    pytest.importorskip("peft")
    with pytest.warns(SealignWarning, match=OTHER_WEIGHTS):
        export_lora(tuned, small_edit.with_normalization("none"), tmp_path / "lora")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_other_weights_of_a_checkpoint_are_said(
    llama: Any, tuned: Any, small_edit: sealign.Edit, tmp_path: Path
) -> None:
    """Exports that do not load the model, too."""
    pytest.importorskip("peft")
    edit = small_edit.with_normalization("none")
    for name, model in {"base": copy.deepcopy(llama).bfloat16(), "tuned": tuned}.items():
        model.save_pretrained(tmp_path / name)
        opened = open_checkpoint(str(tmp_path / name))
        assert opened is not None
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            export_merged(tmp_path / name, edit, tmp_path / f"merged-{name}")
            lora_factors(opened[0], edit, checkpoint=opened[1])
            lora_factors(opened[0], edit, checkpoint=opened[1], ignore_mismatch=True)
        found = [str(warning.message) for warning in said if issubclass(warning.category, SealignWarning)]
        assert len(found) == (2 if name == "tuned" else 0)
        assert all("this checkpoint has other weights" in message for message in found)


def test_another_tokenizer_is_said(llama: Any, tokenizer: Any, small_edit: sealign.Edit) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_other_tokenizer(tokenizer, small_edit)
    other = copy.deepcopy(tokenizer)
    other.chat_template += "{# another #}"
    with pytest.warns(
        SealignWarning, match="and this tokenizer has another chat template, so that prompts are read oth"
    ):
        compare_answers(llama, other, small_edit, ["What is ice?"], max_new_tokens=1)
    other.add_tokens(["<extra>"])
    with pytest.warns(SealignWarning, match="has another vocabulary and chat template"):
        warn_of_other_tokenizer(other, small_edit)
