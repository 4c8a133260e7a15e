"""Verification: equal deployments pass; ones that do nothing, or something else, fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sealign
from sealign.errors import FingerprintError
from sealign.export.verify import Outputs, compare_outputs, model_outputs, reference_outputs
from tests.export.made_edits import random_edit
from tests.tiny_models import build_model

PROMPTS = ["The town lies by the river.", "Bread is baked, and then sold.", "Ask the clerk at the counter:"]


@torch.no_grad()
def test_outputs_are_the_models_own(llama: Any, tokenizer: Any) -> None:
    found = model_outputs(llama, tokenizer, PROMPTS, max_new_tokens=5)
    for prompt, logs, completion in zip(PROMPTS, found.log_probabilities, found.completions, strict=True):
        ids = tokenizer.encode(prompt)
        scores = torch.log_softmax(llama(torch.tensor([ids])).logits[0].double(), -1)
        np.testing.assert_allclose(logs, [float(scores[i - 1, ids[i]]) for i in range(1, len(ids))], rtol=1e-6)
        for token in completion:
            assert token == int(llama(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
        assert len(completion) == 5


def test_the_same_edit_by_other_means_passes(
    llama: Any, tokenizer: Any, small_edit: sealign.Edit, tmp_path: Path
) -> None:
    base, edited = reference_outputs(llama, tokenizer, small_edit, PROMPTS)
    small_edit.save_pretrained(tmp_path / "edit")
    with sealign.apply_edit(llama, sealign.Edit.from_pretrained(tmp_path / "edit")):
        again = model_outputs(llama, tokenizer, PROMPTS)
    agreement = compare_outputs("reloaded", base, edited, again, tolerance=1e-6)
    assert agreement.passed
    assert agreement.largest == 0
    assert agreement.same_tokens == 1.0
    assert agreement.effect > 0
    assert agreement.applied == pytest.approx(1.0, abs=1e-9)


def test_a_deployment_without_the_edit_fails(llama: Any, tokenizer: Any, small_edit: sealign.Edit) -> None:
    base, edited = reference_outputs(llama, tokenizer, small_edit, PROMPTS)
    nothing = compare_outputs("nothing", base, edited, base, tolerance=1e9)
    assert not nothing.fired
    assert not nothing.passed
    assert nothing.applied == 0.0
    assert compare_outputs("no effect", base, base, base, tolerance=1).applied == 0.0
    with sealign.apply_edit(llama, small_edit.reversed()):
        other = model_outputs(llama, tokenizer, PROMPTS)
    wrong = compare_outputs("reversed", base, edited, other, tolerance=1e-3)
    assert not wrong.passed
    with sealign.apply_edit(llama, small_edit, strength=0.1):
        weak = model_outputs(llama, tokenizer, PROMPTS)
    mild = compare_outputs("weak", base, edited, weak, tolerance=1e9)
    assert not mild.fired
    assert 0.05 < mild.applied < 0.3  # a seventh of the strength


def test_an_edit_with_next_to_no_effect(llama: Any, tokenizer: Any, small_edit: sealign.Edit) -> None:
    for strength, seen in ((1.0, True), (1e-7, False), (0.0, False)):
        base, edited = reference_outputs(llama, tokenizer, small_edit.with_strength(strength), PROMPTS)
        assert compare_outputs("x", base, edited, edited, tolerance=1e-3).has_effect is seen


def test_shares_of_equal_tokens() -> None:
    one = [np.zeros(2)]
    edited = Outputs([np.ones(2)], [[1, 2, 3, 4], [5, 6]])
    other = Outputs([np.ones(2)], [[1, 2, 9, 4], [5, 6, 7]])
    base = Outputs(one, [[0], [0]])
    assert compare_outputs("x", base, edited, other, tolerance=1).same_tokens == pytest.approx((2 + 2) / (4 + 3))
    assert compare_outputs("x", base, edited, edited, tolerance=1).same_tokens == 1.0
    empty = Outputs([np.ones(2)], [[], []])
    assert compare_outputs("x", base, empty, empty, tolerance=1).same_tokens == 1.0


def test_a_model_of_another_fingerprint(llama: Any, tokenizer: Any) -> None:
    edit = random_edit(llama, tokenizer)
    other = build_model("llama", vocab_size=len(tokenizer), intermediate_size=96)
    with pytest.raises(FingerprintError):
        reference_outputs(other, tokenizer, edit, PROMPTS)
    base, edited = reference_outputs(other, tokenizer, edit, PROMPTS, ignore_mismatch=True)
    plain = model_outputs(other, tokenizer, PROMPTS)
    for one, two, three in zip(base.log_probabilities, plain.log_probabilities, edited.log_probabilities, strict=True):
        np.testing.assert_array_equal(one, two)
        assert np.abs(one - three).max() > 1e-3
