"""Preference scores against the model's own log-probabilities, and what may be scored."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sealign
from sealign.demonstrations.demonstration import Demonstration
from sealign.errors import DemonstrationError, SettingError
from sealign.evaluation.evaluate_edits import evaluate
from sealign.evaluation.evaluation_config import EvaluationConfig
from sealign.evaluation.preference import length_note, preference_scores
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
    with sealign.apply_edit(llama, edit) if edit is not None else nullcontext():
        found = preference_scores(llama, tokenizer, items, prompt_format=form)
        sides = [
            [_log_probabilities(llama, tokenizer, form, item, text) for text in (item.positive, item.negative)]
            for item in items
        ]
    means = np.array([float(positive.mean() - negative.mean()) for positive, negative in sides])
    totals = np.array([float(positive.sum() - negative.sum()) for positive, negative in sides])
    np.testing.assert_allclose(found["preference_margin"].numerators, means, atol=1e-4)
    np.testing.assert_allclose(found["preference_margin_total"].numerators, totals, atol=1e-3)
    np.testing.assert_array_equal(found["preference_accuracy"].numerators, means > 0)
    assert 0 < found["preference_accuracy"].value < 1


def test_a_demonstration_longer_than_the_context(
    tokenizer: Any, demonstrations: list[Demonstration], tmp_path: Path
) -> None:
    model = build_model("llama", vocab_size=len(tokenizer), max_position_embeddings=48)
    long = Demonstration("What is bread?", "Food.", "A very " + "very " * 20 + "old clock.")
    items = [*demonstrations[:1], long]
    form = PromptFormat("plain")
    with pytest.raises(SettingError, match=r"\d+ tokens"):
        preference_scores(model, tokenizer, items, prompt_format=form)
    config = EvaluationConfig(demonstrations=items, prompt_format=form)
    with pytest.raises(DemonstrationError, match=r"'What is bread\?' is \d+ tokens long, but .* is 48 tokens; shorten"):
        evaluate(model, tokenizer, {}, config=config, output=tmp_path)


@pytest.mark.parametrize("method", ["icl", "mean_difference"])
def test_an_evaluation_scores_the_same(
    method: str, llama: Any, tokenizer: Any, demonstrations: list[Demonstration], tmp_path: Path
) -> None:
    """Also with a prefix before every prompt."""
    configs = {"icl": sealign.ICLConfig(shots=2), "mean_difference": sealign.MeanDifferenceConfig(layers=[1])}
    edit = sealign.fit_edit(llama, tokenizer, demonstrations[:4], config=configs[method])
    config = EvaluationConfig(demonstrations=demonstrations[4:], control_seeds=(), reversed_control=False)
    results = evaluate(llama, tokenizer, {"own": edit}, config=config, output=tmp_path)
    read = [Demonstration(edit.prefix + d.prompt, d.positive, d.negative) for d in demonstrations[4:]]
    with sealign.apply_edit(llama, edit):
        expected = preference_scores(llama, tokenizer, read)
    for name, scores in expected.items():
        found = results.tasks["preference"].metrics[name].item_scores("own")
        np.testing.assert_allclose(found.numerators, scores.numerators, atol=1e-4)
    assert results.tasks["preference"].metrics["preference_margin"].headline
    assert not results.tasks["preference"].metrics["preference_margin_total"].headline


@pytest.mark.parametrize("word", ["shorter", "longer"])
def test_lengths_that_give_the_side_away_are_reported(word: str, tokenizer: Any) -> None:
    sides = ("Yes.", "No, it is not, and it never was one.")
    items = [Demonstration(f"Is it {number}?", *(sides if word == "shorter" else sides[::-1])) for number in range(12)]
    note = length_note(tokenizer, items)
    assert note is not None
    assert f"is {word} in 100%" in note
    assert length_note(tokenizer, planted_demonstrations(60)) is None
    assert length_note(tokenizer, items[:3]) is None  # too few to tell
