"""The demo's result."""

from __future__ import annotations

from typing import Any

import sealign
from sealign.demonstrations.prompts import load_prompts
from sealign.demonstrations.splits import split_demonstrations
from sealign.evaluation.answers import compare_answers
from sealign.evaluation.fit_and_judge import fit_and_judge
from sealign.reproduce.embedded_demo import ANSWERED, DEMO_BEHAVIOURS, QUICK_ANSWERED, QUICK_PAIRS, run_demo


def test_topics_of_the_demo_are_unseen() -> None:
    for behaviour in DEMO_BEHAVIOURS:
        fitted, held_out = split_demonstrations(sealign.load_demonstrations(f"bundled:{behaviour}"))
        assert not {item.topic for item in fitted} & {item.topic for item in held_out}
        assert not {item.prompt for item in [*fitted, *held_out]} & {
            prompt.text for prompt in load_prompts(f"bundled:{behaviour}")
        }


def test_the_demo_fits_judges_and_answers(llama: Any, tokenizer: Any) -> None:
    config = sealign.MeanDifferenceConfig(layers=(1, 2))
    result = run_demo(llama, tokenizer, "formality", config=config, seed=5)
    demonstrations = sealign.load_demonstrations("bundled:formality")
    expected = fit_and_judge(llama, tokenizer, demonstrations, config=config, seed=5)
    assert result.edit.hash == expected.edit.hash
    assert (result.held_out, result.effects, result.verdict) == (expected.held_out, expected.effects, expected.verdict)
    prompts = [prompt.text for prompt in load_prompts("bundled:formality")[:ANSWERED]]
    assert result.answers == compare_answers(llama, tokenizer, expected.edit, prompts, max_new_tokens=48)


def test_the_short_version_does_the_same_with_fewer_pairs_of_all_topics(llama: Any, tokenizer: Any) -> None:
    config = sealign.MeanDifferenceConfig(layers=(1, 2))
    result = run_demo(llama, tokenizer, "formality", config=config, seed=5, quick=True)
    everything = sealign.load_demonstrations("bundled:formality")
    demonstrations = everything[::QUICK_PAIRS]
    assert {item.topic for item in demonstrations} == {item.topic for item in everything}
    expected = fit_and_judge(llama, tokenizer, demonstrations, config=config, seed=5, quick=True)
    assert result.quick
    assert result.edit.hash == expected.edit.hash
    assert (result.held_out, result.effects, result.verdict) == (expected.held_out, expected.effects, expected.verdict)
    assert len(result.answers) == QUICK_ANSWERED


def test_a_given_strength_is_used(llama: Any, tokenizer: Any) -> None:
    config = sealign.MeanDifferenceConfig(layers=[1])
    assert run_demo(llama, tokenizer, "positivity", config=config, strength=0.25).edit.strength == 0.25
