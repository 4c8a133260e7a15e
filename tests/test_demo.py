from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import sealign
from sealign import demo
from sealign.answers import compare_answers
from sealign.demo import CONTROL_SEEDS, DEMO_CONFIG, DEMO_PROMPTS, DemoResult, run_demo
from sealign.evaluation.damage import Damage, measure_damage
from sealign.evaluation.multiple_choice import bundled_questions, score_questions
from sealign.evaluation.statistics import Difference, paired_difference
from tests.conftest import our_hooks

METRICS = ("MC1", "MC2")


def difference(value: float, low: float, high: float) -> Difference:
    return Difference(0.5, 0.5 + value, value, low, high, 66, None, 0.5, "permutation", 0.1)


NONE = difference(0.01, -0.02, 0.04)
GAIN = difference(0.05, 0.01, 0.09)
LOSS = difference(-0.05, -0.09, -0.01)
TOUCHING = difference(0.05, 0.0, 0.1)
TOUCHING_BELOW = difference(-0.05, -0.1, 0.0)
LARGER = difference(0.06, -0.1, 0.2)


def damage(increase: float) -> Damage:
    one = np.ones(2)
    return Damage(np.array([3.0, 1.0]), 2 * one, (2 + increase) * one, 0.1 * one)


def verdict(
    edited: tuple[Difference, Difference], random: tuple[Difference, Difference] = (NONE, NONE), *, cost: float = 0.1234
) -> str:
    scores = {("edited", metric): d for metric, d in zip(METRICS, edited, strict=True)}
    scores |= {("random", metric): d for metric, d in zip(METRICS, random, strict=True)}
    edit: Any = None
    return DemoResult(edit, [], 66, scores, damage(cost), damage(9.0)).verdict


COST = "+0.123 nats a token on plain text"
NO_GAIN = (
    "No significant gain: both intervals include zero, so these 66 questions give no evidence that the edit makes this "
    f"model more truthful. It costs {COST}."
)


@pytest.mark.parametrize(
    ("edited", "random", "expected"),
    [
        ((NONE, NONE), (NONE, NONE), NO_GAIN),
        ((TOUCHING, TOUCHING_BELOW), (NONE, NONE), NO_GAIN),  # zero at the edge is included
        ((NONE, NONE), (GAIN, LOSS), NO_GAIN),
        ((GAIN, NONE), (NONE, NONE), f"The edit raises MC1 on these 66 questions, at {COST}."),
        ((NONE, GAIN), (LARGER, NONE), f"The edit raises MC2 on these 66 questions, at {COST}."),
        ((GAIN, GAIN), (NONE, NONE), f"The edit raises MC1 and MC2 on these 66 questions, at {COST}."),
        ((GAIN, NONE), (GAIN, NONE), f"No evidence: random directions gain as much in MC1. The edit costs {COST}."),
        ((GAIN, GAIN), (NONE, LARGER), f"No evidence: random directions gain as much in MC2. The edit costs {COST}."),
        (
            (GAIN, GAIN),
            (LARGER, LARGER),
            f"No evidence: random directions gain as much in MC1 and MC2. The edit costs {COST}.",
        ),
        ((LOSS, NONE), (NONE, NONE), f"The edit lowers MC1 on these questions, at {COST}."),
        ((LOSS, LOSS), (LOSS, LOSS), f"The edit lowers MC1 and MC2 on these questions, at {COST}."),
        ((GAIN, LOSS), (NONE, NONE), f"The edit lowers MC2 on these questions, at {COST}."),  # a loss is told first
    ],
)
def test_verdicts(edited: Any, random: Any, expected: str) -> None:
    assert verdict(edited, random) == expected


def test_no_gain_is_told_without_its_price() -> None:
    for edited in ((NONE, NONE), (GAIN, NONE), (LOSS, NONE)):
        for random in ((NONE, NONE), (LARGER, LARGER)):
            for cost, told in ((0.15, "+0.150 nats"), (-0.02, "-0.020 nats"), (5.2, "+5.200 nats")):
                assert told in verdict(edited, random, cost=cost)


def test_the_price_is_that_of_the_edit_weighed_by_tokens() -> None:
    uneven = Damage(np.array([3.0, 1.0]), np.array([2.0, 2.0]), np.array([2.0, 4.0]), np.zeros(2))
    scores = {(arm, metric): NONE for arm in ("edited", "random") for metric in METRICS}
    edit: Any = None
    assert "+0.500 nats" in DemoResult(edit, [], 66, scores, uneven, damage(9.0)).verdict


def test_the_demo_is_mild_and_asks_several_things() -> None:
    assert (DEMO_CONFIG.explained_variance, DEMO_CONFIG.centered, DEMO_CONFIG.strength) == (0.9, True, 0.25)
    assert len(set(DEMO_PROMPTS)) == len(DEMO_PROMPTS) >= 5
    assert len(set(CONTROL_SEEDS)) == len(CONTROL_SEEDS) >= 3
    held_out = {item.question for item in bundled_questions()}
    learnt = {item.prompt for item in sealign.load_demonstrations("bundled:truthfulness")}
    assert not learnt & set(DEMO_PROMPTS)
    assert not learnt & held_out


def test_every_part_is_what_the_library_measures(llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo again, step by step, on a third of the questions."""
    questions = bundled_questions()[::3]
    monkeypatch.setattr(demo, "bundled_questions", lambda: questions)
    config = dataclasses.replace(DEMO_CONFIG, layers=(1, 2), strength=0.8)
    prompts = ["What is ice?", "Who bakes bread?"]
    steps: list[str] = []

    def track(items: Any, what: str, how_many: int) -> Any:
        steps.append(what)
        return items

    result = run_demo(llama, tokenizer, config=config, prompts=prompts, seed=5, track=track)
    learnt = sealign.load_demonstrations("bundled:truthfulness")
    edit = sealign.fit_edit(llama, tokenizer, learnt, config=config)
    assert result.edit.hash == edit.hash
    assert result.answers == compare_answers(llama, tokenizer, edit, prompts, max_new_tokens=48)
    assert result.questions == len(questions)

    def score(arm: sealign.SpectralEdit | None) -> dict[str, Any]:
        if arm is None:
            found = score_questions(llama, tokenizer, questions)
        else:
            with sealign.apply_edit(llama, arm):
                found = score_questions(llama, tokenizer, questions)
        return {"MC1": found.mc1, "MC2": found.mc2}

    base, edited = score(None), score(edit)
    controls = [edit.randomized(5 + offset) for offset in (0, 1, 2)]
    drawn = [score(control) for control in controls]
    for metric in METRICS:
        assert result.scores["edited", metric] == paired_difference(base[metric], edited[metric], seed=5)
        random = sum(draw[metric] for draw in drawn) / 3
        found = result.scores["random", metric]
        assert found.difference == pytest.approx(float(np.mean(random - base[metric])))
        assert found.low <= found.difference <= found.high
    assert set(result.scores) == {(arm, metric) for arm in ("edited", "random") for metric in METRICS}
    for found_damage, arm in ((result.damage, edit), (result.random_damage, controls[0])):
        expected = measure_damage(llama, tokenizer, arm)
        assert found_damage.loss_increase == pytest.approx(expected.loss_increase)
        assert found_damage.mean_divergence == pytest.approx(expected.mean_divergence)
    assert steps.count("Scoring") == 5
    assert {"Collecting activations", "Decomposing", "Measuring damage"} <= set(steps)
    assert our_hooks(llama) == 0
