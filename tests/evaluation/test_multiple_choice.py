from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import sealign
from sealign.evaluation.multiple_choice import MultipleChoiceQuestion, bundled_questions, score_questions

QUESTIONS = [
    MultipleChoiceQuestion("What is ice?", ("Frozen water.", "Water that froze."), ("Frozen air.", "Snow.", "Glass.")),
    MultipleChoiceQuestion("Where do fish live?", ("In water.",), ("In trees.",)),
    MultipleChoiceQuestion("What does a clock show?", ("The time.",), ("The weather.", "The way to the river.")),
]


@torch.no_grad()
def test_against_the_definitions(llama: Any, tokenizer: Any) -> None:
    form = sealign.PromptFormat("chat")
    found = score_questions(llama, tokenizer, QUESTIONS, prompt_format=form)
    for index, item in enumerate(QUESTIONS):
        probabilities = []
        for answer in (*item.correct, *item.incorrect):
            start = len(form.encode_prompt(tokenizer, item.question))
            ids = form.encode(tokenizer, item.question, answer)
            logs = torch.log_softmax(llama(torch.tensor([ids])).logits[0].double(), dim=-1)
            probabilities.append(math.exp(sum(float(logs[i - 1, ids[i]]) for i in range(start, len(ids)))))
        true = len(item.correct)
        assert found.mc1[index] == (probabilities[0] > max(probabilities[true:]))
        assert found.mc2[index] == pytest.approx(sum(probabilities[:true]) / sum(probabilities), rel=1e-3)


def test_bundled_questions_have_a_best_answer_and_false_ones() -> None:
    questions = bundled_questions()
    assert all(item.correct and item.incorrect for item in questions)


@pytest.mark.slow
def test_the_embedded_model_knows_capitals(smollm2: Any) -> None:
    pairs = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo"}
    questions = [
        MultipleChoiceQuestion(
            f"What is the capital of {country}?",
            (f"The capital of {country} is {capital}.",),
            tuple(f"The capital of {country} is {other}." for other in pairs.values() if other != capital),
        )
        for country, capital in pairs.items()
    ]
    model, tokenizer = smollm2
    found = score_questions(model, tokenizer, questions)
    assert found.mc1.tolist() == [1, 1, 1, 1]
    assert np.all(found.mc2 > 0.5)
