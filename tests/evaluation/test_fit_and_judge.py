"""A fit and its verdict, repeated step by step with the functions of the library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sealign
from sealign.demonstrations.splits import split_demonstrations
from sealign.errors import DemonstrationError
from sealign.evaluation.fit_and_judge import fit_and_judge
from sealign.evaluation.preference import preference_scores
from sealign.evaluation.statistics import paired_difference
from sealign.evaluation.verdict import judge_effects
from tests.conftest import our_hooks


def test_all_results_are_those_of_the_library(llama: Any, tokenizer: Any) -> None:
    config = sealign.MeanDifferenceConfig(layers=(1, 2))
    steps: list[str] = []

    def track(items: Any, what: str, _how_many: int) -> Any:
        steps.append(what)
        return items

    demonstrations = sealign.load_demonstrations("bundled:formality")
    result = fit_and_judge(llama, tokenizer, demonstrations, config=config, seed=5, track=track)
    fitted, held_out = split_demonstrations(demonstrations, holdout=0.3, seed=5)
    assert not {item.topic for item in fitted} & {item.topic for item in held_out}
    edit = sealign.fit_edit(llama, tokenizer, fitted, config=config)
    assert isinstance(edit, sealign.Edit)
    edit = edit.with_strength(result.edit.strength)
    assert result.edit.hash == edit.hash
    assert result.edit.record.fitted_on == [item.hash for item in fitted]
    assert result.held_out == len(held_out)

    def score(arm: sealign.Edit) -> Any:
        with sealign.apply_edit(llama, arm):
            return preference_scores(llama, tokenizer, held_out)

    base, edited, turned = score(edit.with_strength(0.0)), score(edit), score(edit.reversed())
    drawn = [score(edit.randomized(5 + offset)) for offset in (0, 1, 2)]
    for effect in result.effects:
        columns = [scores[effect.name].numerators for scores in (base, edited, turned, *drawn)]
        random = np.mean(columns[3:], axis=0)
        assert effect.random is not None
        assert effect.over_random is not None
        assert effect.reversed is not None
        assert effect.edited == paired_difference(columns[0], columns[1], seed=5)
        assert effect.reversed == paired_difference(columns[0], columns[2], seed=5)
        assert effect.random.difference == pytest.approx(float(np.mean(random - columns[0])))
        assert effect.over_random.difference == pytest.approx(float(np.mean(columns[1] - random)))
    assert result.verdict == judge_effects(result.effects, result.damage["edited"].loss_increase)
    assert set(result.damage) == set(result.domain_damage) == {"edited", "random directions", "reversed"}
    assert {
        "Collecting activations",
        "Choosing the strength",
        "Scoring held-out demonstrations",
        "Measuring damage",
    } <= set(steps)
    assert our_hooks(llama) == 0


def test_a_given_strength_is_used(llama: Any, tokenizer: Any, demonstrations: list[sealign.Demonstration]) -> None:
    config = sealign.MeanDifferenceConfig(layers=[1])
    found = fit_and_judge(llama, tokenizer, demonstrations, config=config, strength=0.25)
    assert found.edit.strength == 0.25


def test_too_few_demonstrations(llama: Any, tokenizer: Any, demonstrations: list[sealign.Demonstration]) -> None:
    with pytest.raises(DemonstrationError):
        fit_and_judge(llama, tokenizer, demonstrations[:1], config=sealign.MeanDifferenceConfig(layers=[1]))


def test_damage_is_measured_on_a_third_of_the_texts_where_it_shall_be_quick(llama: Any, tokenizer: Any) -> None:
    config = sealign.MeanDifferenceConfig(layers=[1])
    demonstrations = sealign.load_demonstrations("bundled:formality")[:40]
    whole, short = (
        fit_and_judge(llama, tokenizer, demonstrations, config=config, strength=0.2, quick=quick)
        for quick in (False, True)
    )
    assert whole.edit.hash == short.edit.hash
    assert whole.effects == short.effects
    for arm, damage in whole.damage.items():
        assert short.damage[arm].base.tolist() == pytest.approx(damage.base[::3].tolist(), rel=1e-5)
        answers = whole.domain_damage[arm].base[:16:3].tolist()
        assert short.domain_damage[arm].base.tolist() == pytest.approx(answers, rel=1e-5)
