"""Preference scores against the model's own log-probabilities, and what may be scored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import sealign
from sealign.demonstrations.demonstration import Demonstration
from sealign.errors import DemonstrationError
from sealign.evaluation.harness import SealignLM
from sealign.evaluation.preference import length_note, preference_scores, split_seen
from sealign.models.prompt_format import PromptFormat
from tests.evaluation.planted import planted_demonstrations
from tests.evaluation_data import HARNESS_WARNINGS
from tests.tiny_models import build_model

pytestmark = HARNESS_WARNINGS


def _log_probabilities(model: Any, tokenizer: Any, form: PromptFormat, item: Demonstration, text: str) -> torch.Tensor:
    """Log-probability of each token of a completion, from one plain forward pass."""
    start = len(form.encode_prompt(tokenizer, item.prompt))
    ids = torch.tensor([form.encode(tokenizer, item.prompt, text)])
    with torch.no_grad():
        logs = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
    return logs[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0]


@pytest.mark.parametrize("form", [PromptFormat(), PromptFormat("plain"), PromptFormat("few_shot", "Be short.")])
@pytest.mark.parametrize("edited", [False, True])
def test_against_the_models_log_probabilities(
    edited: bool, form: PromptFormat, llama: Any, tokenizer: Any, demonstrations: list[Demonstration]
) -> None:
    # A prompt that two demonstrations share, which is run once.
    items = [*demonstrations, Demonstration(demonstrations[2].prompt, "It is not.", "It is, very.")]
    edit = sealign.fit_edit(llama, tokenizer, demonstrations, config=sealign.MeanDifferenceConfig()) if edited else None
    lm = SealignLM(llama, edit=edit, tokenizer=tokenizer)
    try:
        found = preference_scores(lm, items, prompt_format=form)
        sides = [
            [_log_probabilities(llama, tokenizer, form, item, text) for text in (item.positive, item.negative)]
            for item in items
        ]
    finally:
        lm.close()
    means = np.array([float(positive.mean() - negative.mean()) for positive, negative in sides])
    totals = np.array([float(positive.sum() - negative.sum()) for positive, negative in sides])
    np.testing.assert_allclose(found["preference_margin"].numerators, means, atol=1e-4)
    np.testing.assert_allclose(found["preference_margin_total"].numerators, totals, atol=1e-3)
    np.testing.assert_array_equal(found["preference_accuracy"].numerators, means > 0)
    assert 0 < found["preference_accuracy"].value < 1


def test_a_demonstration_longer_than_the_context(tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    model = build_model("llama", vocab_size=len(tokenizer), max_position_embeddings=48)
    long = Demonstration("What is bread?", "Food.", "A very " + "very " * 20 + "old clock.")
    lm = SealignLM(model, tokenizer=tokenizer)
    with pytest.raises(
        DemonstrationError, match=r"'What is bread\?' is \d+ tokens long, but .* context is 48; shorten"
    ):
        preference_scores(lm, [*demonstrations[:1], long], prompt_format=PromptFormat("plain"))


def test_what_was_fitted_on_is_not_scored(llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    # The same prompt with other completions counts as seen.
    leaked = Demonstration(demonstrations[1].prompt, "A baker.", "A clock by the river.")
    edit = sealign.fit_edit(llama, tokenizer, demonstrations[:4], config=sealign.MeanDifferenceConfig())
    fitted, rest = split_seen([*demonstrations, leaked], [edit])
    assert fitted == [*demonstrations, leaked]
    assert rest == demonstrations[4:]
    assert split_seen(demonstrations, [], fits=True) == (demonstrations, [])
    fitted, rest = split_seen(demonstrations, [], fits=True, holdout=0.3)
    assert len(fitted) == 5
    assert sorted(item.hash for item in fitted + rest) == sorted(item.hash for item in demonstrations)


@pytest.mark.parametrize("word", ["shorter", "longer"])
def test_lengths_that_give_the_side_away_are_reported(word: str, tokenizer: Any) -> None:
    sides = ("Yes.", "No, it is not, and it never was one.")
    items = [Demonstration(f"Is it {number}?", *(sides if word == "shorter" else sides[::-1])) for number in range(12)]
    note = length_note(tokenizer, items)
    assert note is not None
    assert f"is {word} in 100%" in note
    assert length_note(tokenizer, planted_demonstrations(60)) is None
    assert length_note(tokenizer, items[:3]) is None  # too few to tell
