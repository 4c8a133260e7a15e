"""Verdicts: each rule on constructed effects, and the error rate without an effect."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from sealign.evaluation.statistics import Aim, Difference, paired_difference
from sealign.evaluation.verdict import Effect, judge_effects


def difference(value: float, p_value: float, half: float = 0.02) -> Difference:
    return Difference(0.5, 0.5 + value, value, value - half, value + half, 66, None, p_value, "permutation", 0.1)


def effect(value: float, p_value: float, over: float | None = 0.04, name: str = "acc", aim: Aim = "higher") -> Effect:
    beyond = None if over is None else difference(over, 0.5)
    return Effect(name, difference(value, p_value), difference(0.0, 0.9), beyond, None, aim)


NONE = effect(0.01, 0.6)
GAIN = effect(0.05, 0.001)
LOSS = effect(-0.05, 0.001, name="mmlu")
MATCHED = effect(0.05, 0.001, over=0.01)
UNCONTROLLED = effect(0.05, 0.001, over=None)
LESS_BIAS = effect(-0.05, 0.001, over=-0.04, name="bias", aim="lower")
TO_THE_VALUE = effect(-0.05, 0.001, over=-0.04, name="score", aim=0.4)  # from 0.5 to 0.45
PAST_THE_VALUE = effect(-0.05, 0.001, over=-0.04, name="score", aim=0.49)  # 0.01 off becomes 0.04 off
NO_AIM = effect(-0.05, 0.001, aim=None)
MORE_BIAS = effect(0.05, 0.001, name="bias", aim="lower")


@pytest.mark.parametrize(
    ("effects", "damage", "word", "words"),
    [
        ([GAIN], 0.01, "helps", r"acc \+0\.050 \[\+0\.030, \+0\.070\].* at \+0\.010 nats"),
        ([GAIN, NONE], 0.05, "helps", "acc"),
        ([LESS_BIAS], -0.01, "helps", r"bias -0\.050"),
        ([GAIN, MATCHED], 0.01, "helps", "acc"),
        ([NONE], 0.01, "no evidence", "over the metric measured"),
        ([NONE, NONE], 0.01, "no evidence", "over the 2 metrics measured"),
        ([MATCHED], 0.01, "no evidence", "random directions do as well"),
        ([UNCONTROLLED], 0.01, "no evidence", "no random control"),
        ([effect(0.05, 0.03)] + 3 * [NONE], 0.01, "no evidence", "noise"),  # 4 x 0.03 after Holm
        ([LOSS], 0.01, "harms", "worsens mmlu"),
        ([GAIN, LOSS], 0.01, "harms", "worsens mmlu .*, though it improves acc"),
        ([MORE_BIAS], 0.01, "harms", "worsens bias"),
        ([GAIN], 0.051, "harms", r"over the budget of 0\.05; the gain on acc .* does not count"),
        ([TO_THE_VALUE], 0.01, "helps", "score"),
        ([PAST_THE_VALUE], 0.01, "harms", "score"),
        ([NO_AIM], 0.01, "no evidence", "noise"),
        ([NONE], 3.0, "harms", r"\+3\.000 nats"),
    ],
)
def test_every_rule(effects: list[Effect], damage: float, word: str, words: str) -> None:
    verdict = judge_effects(effects, damage)
    assert verdict.word == word
    assert verdict.sentence.lower().startswith(f"{word}: ")
    assert re.search(words, verdict.sentence)


def test_a_reversed_edit_that_does_as_well_is_mentioned() -> None:
    for value, words in ((0.05, True), (0.06, True), (0.04, False)):
        both = dataclasses.replace(GAIN, reversed=difference(value, 0.01))
        verdict = judge_effects([both], 0.0)
        assert verdict.word == "helps"
        assert ("The reversed edit does as well on acc" in verdict.sentence) is words


def test_the_budget_can_be_chosen() -> None:
    assert judge_effects([GAIN], 0.2, max_damage=0.2).word == "helps"
    assert judge_effects([GAIN], 0.2, max_damage=0.1).word == "harms"


def test_verdicts_without_an_effect_are_rarely_wrong() -> None:
    """With noise only, on three metrics, at most 5 % of the runs may find an effect."""
    generator = np.random.default_rng(0)
    words = []
    for _ in range(300):
        effects = []
        for _ in range(3):
            base, edited, random = generator.normal(size=(3, 40))
            first, second, third = (
                paired_difference(*pair, resamples=400) for pair in ((base, edited), (base, random), (random, edited))
            )
            effects.append(Effect("acc", first, second, third))
        words.append(judge_effects(effects, 0.0).word)
    assert words.count("no evidence") >= 276  # 300 x 0.95 less 2.4 standard deviations
    assert words.count("helps") <= 12


def test_a_planted_gain_is_found() -> None:
    generator = np.random.default_rng(1)
    base = generator.normal(size=60)
    edited, random = base + generator.normal(0.3, 0.4, 60), base + generator.normal(0, 0.4, 60)
    first, second, third = (paired_difference(*pair) for pair in ((base, edited), (base, random), (random, edited)))
    assert judge_effects([Effect("acc", first, second, third)], 0.0).word == "helps"
    assert judge_effects([Effect("acc", first, first, paired_difference(edited, edited))], 0.0).word != "helps"


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), float("-inf")])
def test_damage_that_is_not_finite_is_broken(damage: float) -> None:
    verdict = judge_effects([GAIN, LOSS], damage)
    assert (verdict.word, verdict.sentence) == (
        "broken",
        "Broken: NaN or infinite numbers in the loss on neutral text.",
    )


def test_scores_that_are_not_finite_are_broken_whatever_else() -> None:
    for effects in ([], [GAIN], [LOSS]):
        verdict = judge_effects(effects, 0.2, broken=["mc2", "acc"])
        assert (verdict.word, verdict.sentence) == ("broken", "Broken: NaN or infinite numbers in mc2 and acc.")
