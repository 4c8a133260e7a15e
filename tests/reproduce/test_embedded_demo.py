from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sealign
from sealign.evaluation.answers import compare_answers
from sealign.evaluation.damage import Damage, measure_damage
from sealign.evaluation.evaluation_config import CONTROL_SEEDS
from sealign.evaluation.multiple_choice import bundled_questions, score_questions
from sealign.evaluation.statistics import Difference, paired_difference
from sealign.evaluation.verdict import Effect, judge_effects
from sealign.reproduce import embedded_demo as demo
from sealign.reproduce.embedded_demo import DEMO_CONFIG, DEMO_PROMPTS, DemoResult, run_demo
from tests.conftest import our_hooks

METRICS = ("MC1", "MC2")


NONE = Difference(0.5, 0.51, 0.01, -0.02, 0.04, 66, None, 0.5, "permutation", 0.1)


def damage(increase: float) -> Damage:
    one = np.ones(2)
    return Damage(np.array([3.0, 1.0]), 2 * one, (2 + increase) * one, 0.1 * one)


def test_the_damage_is_that_of_the_edit_weighted_by_tokens() -> None:
    uneven = Damage(np.array([3.0, 1.0]), np.array([2.0, 2.0]), np.array([2.0, 4.0]), np.zeros(2))
    edit: Any = None
    found = DemoResult(edit, [], 66, [Effect("MC1", NONE, NONE, NONE)], uneven, damage(9.0)).verdict
    assert found == "Harms: it costs +0.500 nats per token on neutral text, over the budget of 0.05."


def test_the_demo_is_mild_and_has_several_prompts() -> None:
    assert (DEMO_CONFIG.explained_variance, DEMO_CONFIG.centered, DEMO_CONFIG.strength) == (0.9, True, 0.25)
    assert len(set(DEMO_PROMPTS)) == len(DEMO_PROMPTS) >= 5
    assert len(set(CONTROL_SEEDS)) == len(CONTROL_SEEDS) >= 3
    held_out = {item.question for item in bundled_questions()}
    learnt = {item.prompt for item in sealign.load_demonstrations("bundled:truthfulness")}
    assert not learnt & set(DEMO_PROMPTS)
    assert not learnt & held_out


def test_all_results_are_those_of_the_library(llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat the demo step by step on a third of the questions."""
    questions = bundled_questions()[::3]
    monkeypatch.setattr(demo, "bundled_questions", lambda: questions)
    config = DEMO_CONFIG.replace(layers=(1, 2), strength=0.8)
    prompts = ["What is ice?", "Who bakes bread?"]
    steps: list[str] = []

    def track(items: Any, what: str, _how_many: int) -> Any:
        steps.append(what)
        return items

    result = run_demo(llama, tokenizer, config=config, prompts=prompts, seed=5, track=track)
    learnt = sealign.load_demonstrations("bundled:truthfulness")
    edit = sealign.fit_edit(llama, tokenizer, learnt, config=config)
    assert result.edit.hash == edit.hash
    assert result.answers == compare_answers(llama, tokenizer, edit, prompts, max_new_tokens=48)
    assert result.questions == len(questions)

    def score(arm: sealign.Edit | None) -> dict[str, Any]:
        if arm is None:
            found = score_questions(llama, tokenizer, questions)
        else:
            with sealign.apply_edit(llama, arm):
                found = score_questions(llama, tokenizer, questions)
        return {"MC1": found.mc1, "MC2": found.mc2}

    base, edited = score(None), score(edit)
    controls = [edit.randomized(5 + offset) for offset in (0, 1, 2)]
    drawn = [score(control) for control in controls]
    for effect, metric in zip(result.effects, METRICS, strict=True):
        assert effect.name == metric
        assert effect.edited == paired_difference(base[metric], edited[metric], seed=5)
        random = sum(draw[metric] for draw in drawn) / 3
        assert effect.random is not None
        assert effect.over_random is not None
        assert effect.random.difference == pytest.approx(float(np.mean(random - base[metric])))
        assert effect.over_random.difference == pytest.approx(float(np.mean(edited[metric] - random)))
        assert effect.random.low <= effect.random.difference <= effect.random.high
    assert result.verdict == judge_effects(result.effects, result.damage.loss_increase).sentence
    for found_damage, arm in ((result.damage, edit), (result.random_damage, controls[0])):
        expected = measure_damage(llama, tokenizer, arm)
        assert found_damage.loss_increase == pytest.approx(expected.loss_increase)
        assert found_damage.mean_divergence == pytest.approx(expected.mean_divergence)
    assert steps.count("Scoring") == 5
    assert {"Collecting activations", "Fitting layers", "Measuring damage"} <= set(steps)
    assert our_hooks(llama) == 0
