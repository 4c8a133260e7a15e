"""In-context learning: which demonstrations stand before every prompt, and in which form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import sealign
from sealign.demonstrations.demonstration import Demonstration
from sealign.edits.attach import apply_edit
from sealign.errors import DemonstrationError, SettingError
from sealign.methods.icl import few_shot_text
from sealign.methods.registry import fit_edit
from tests.tiny_models import logits


def test_it_writes_answered_questions(fitted: Callable[[str], Any], demonstrations: list[Demonstration]) -> None:
    prefix = fitted("icl").prefix
    assert prefix.count("Q: ") == prefix.count("\nA: ") == 2
    assert prefix.endswith("\n\n")
    assert any(few_shot_text([item]) in prefix for item in demonstrations)
    assert few_shot_text(demonstrations[:1], "Be brief.").startswith("Be brief.\n\nQ: ")


def test_instruction_and_selection(llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    def prefix(**settings: Any) -> str:
        return fit_edit(llama, tokenizer, demonstrations, config=sealign.ICLConfig(**settings)).prefix

    assert prefix(instruction="Be brief.").startswith("Be brief.\n\nQ: ")
    assert prefix(shots=2, seed=1) == prefix(shots=2, seed=1)
    assert len({prefix(shots=2, seed=seed) for seed in range(8)}) > 1
    whole = prefix(shots=7)
    assert all(few_shot_text([item]) in whole for item in demonstrations)


def test_the_model_is_not_changed(fitted: Callable[[str], Any], llama: Any, tokenizer: Any) -> None:
    before = logits(llama, tokenizer)
    with apply_edit(llama, fitted("icl")) as handle:
        assert torch.equal(logits(llama, tokenizer), before)
        assert handle.modules == []
    assert fitted("icl").changes_scores
    assert not fitted("icl").has_own_cache


def test_too_few_demonstrations(llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    with pytest.raises(DemonstrationError, match="shots is 4, but there are 3 demonstrations"):
        fit_edit(llama, tokenizer, demonstrations[:3], config=sealign.ICLConfig(shots=4))
    with pytest.raises(SettingError, match="shots is 0, but it must be at least 1"):
        sealign.ICLConfig(shots=0)
