"""A judge's preference between the answers of an arm and those of the base model, blind and in both orders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sealign.evaluation.answer_measures import ArmAnswer
from sealign.evaluation.journal import Journal
from sealign.evaluation.judge import Judge, decide_all
from sealign.evaluation.results import BASE
from sealign.progress import Track, no_progress

CRITERION = "quality, that is, how helpful, correct and well written the answer is"
"""What a judge compares by unless the user says otherwise."""

COMPARE_PROMPT = """You compare two answers to the same prompt by one criterion: {criterion}.

Prompt: {prompt}

Answer 1: {first}

Answer 2: {second}

Is answer 1 better than answer 2 by this criterion? Reply with yes or no."""


@dataclass(frozen=True)
class PairJudge:
    """A judge that compares answers with those of the base model.

    Attributes:
        judge: The judge.
        criterion: What it compares by.
        journal: Journal of its judgements.
    """

    judge: Judge
    criterion: str
    journal: Journal


def compare_with_base(
    answers: Mapping[str, Sequence[ArmAnswer]], compared: PairJudge, *, track: Track = no_progress
) -> tuple[list[float], str]:
    """Return the preference of a judge for each answer over the base model's, and a note on its consistency.

    The judge sees two answers without their origin, once in each order, and says whether the first is better. The
    preference is 1 if it prefers the answer to the base model's in both orders, 0 in neither, else 1/2. Equal answers
    have 1/2, as the base model itself, without asking.

    Args:
        answers: Mapping from arm to its answer to each prompt; one arm is ``base``.
        compared: The judge, its criterion and its journal.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.

    Returns:
        The preferences of all arms in turn, and the note.

    Raises:
        JudgeError: The judge does not answer, or its answer has the wrong form.
    """
    judge, criterion = compared.judge, compared.criterion
    pairs = [pair for arm in answers for pair in zip(answers[BASE], answers[arm], strict=True)]
    questions = [_questions(criterion, base, answer) for base, answer in pairs]
    asked_texts = [text for both in questions for text in both]
    decided = iter(decide_all(judge, asked_texts, journal=compared.journal, track=track))
    scores, agreed, asked = [], 0, 0
    for both in questions:
        if not both:
            scores.append(0.5)
            continue
        first, second = next(decided), next(decided)
        scores.append((float(first) + float(not second)) / 2)
        asked += 1
        agreed += first != second
    note = f"judge_preference is the preference of {judge.name} over the base model's answer by {criterion}; " + (
        f"in {asked - agreed} of {asked} pairs the judge changed its mind with the order, which counts as a tie"
        if asked
        else "all answers are those of the base model, so that it was not asked"
    )
    return scores, note


def _questions(criterion: str, base: ArmAnswer, answer: ArmAnswer) -> list[str]:
    """Return the questions of a pair: the answer first, and the base model's first; none for equal answers."""
    if base.text == answer.text:
        return []
    prompt = "\n\n".join([*(turn.content for turn in base.prompt.history), base.prompt.text])
    return [
        COMPARE_PROMPT.format(criterion=criterion, prompt=prompt, first=one.text, second=other.text)
        for one, other in ((answer, base), (base, answer))
    ]
