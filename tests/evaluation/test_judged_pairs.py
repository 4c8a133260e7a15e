"""A judge compares answers blind and in both orders."""

from __future__ import annotations

from typing import Any

from sealign.demonstrations import Prompt, Turn
from sealign.evaluation.answer_measures import ArmAnswer
from sealign.evaluation.journal import Journal
from sealign.evaluation.judged_pairs import PairJudge, compare_with_base

PROMPTS = [Prompt("Why?"), Prompt("How?", (Turn("system", "Be brief."),)), Prompt("Who?")]


def answers(**texts: list[str]) -> dict[str, list[ArmAnswer]]:
    return {
        arm: [ArmAnswer(arm, prompt, text, (1,)) for prompt, text in zip(PROMPTS, of_arm, strict=True)]
        for arm, of_arm in texts.items()
    }


class Longer:
    """A judge that prefers the longer answer, or always the first."""

    name = "longer"

    def __init__(self, *, first: bool = False) -> None:
        self.first = first
        self.asked: list[str] = []

    def decide(self, questions: Any, track: Any) -> list[bool]:
        self.asked += questions
        return [self.first or self._longer(question) for question in questions]

    def _longer(self, question: str) -> bool:
        one, other = question.split("Answer 1: ")[1].split("\n\nIs answer 1")[0].split("\n\nAnswer 2: ")
        return len(one) > len(other)


def test_preferences_over_the_base_model() -> None:
    judge = Longer()
    found = answers(base=["short", "a long answer", "same"], mild=["a longer one", "brief", "same"])
    scores, note = compare_with_base(found, PairJudge(judge, "length", Journal(None)))
    assert scores == [0.5, 0.5, 0.5, 1.0, 0.0, 0.5]
    assert len(judge.asked) == 4  # equal answers are not compared
    assert "by one criterion: length." in judge.asked[0]
    assert "Prompt: Be brief.\n\nHow?\n\nAnswer 1: " in judge.asked[2]
    assert "base" not in judge.asked[0]
    assert "mild" not in judge.asked[0]
    assert "longer over the base model's answer by length; in 0 of 2 pairs the judge changed its mind" in note


def test_a_judge_that_sees_only_the_order_prefers_nothing() -> None:
    found = answers(base=["a", "bb", "c"], mild=["aa", "b", "cc"])
    scores, note = compare_with_base(found, PairJudge(Longer(first=True), "length", Journal(None)))
    assert scores == [0.5] * 6
    assert "in 3 of 3 pairs the judge changed its mind with the order, which counts as a tie" in note


def test_judgements_are_kept(tmp_path: Any) -> None:
    found = answers(base=["a", "bb", "c"], mild=["aa", "b", "cc"])
    path = tmp_path / "judge.jsonl"
    first = compare_with_base(found, PairJudge(Longer(), "length", Journal(path)))
    again = Longer()
    assert compare_with_base(found, PairJudge(again, "length", Journal(path))) == first
    assert again.asked == []
    compare_with_base(found, PairJudge(again, "tone", Journal(path)))
    assert len(again.asked) == 6


def test_nothing_to_compare() -> None:
    judge = Longer()
    scores, note = compare_with_base(answers(base=["a", "b", "c"]), PairJudge(judge, "length", Journal(None)))
    assert (scores, judge.asked) == ([0.5] * 3, [])
    assert "it was not asked" in note
