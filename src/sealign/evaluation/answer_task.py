"""The answers to open-ended prompts as a task: every arm answers, and each answer is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sealign.demonstrations.prompts import Prompt
from sealign.errors import SettingError
from sealign.evaluation.answer_measures import JUDGED, LOSS, REPETITION, AnswerMeasure, ArmAnswer, Scorer, repetition
from sealign.evaluation.item_scores import ItemScores
from sealign.evaluation.journal import Journal
from sealign.evaluation.judged_pairs import PairJudge, compare_with_base
from sealign.evaluation.results import BASE, Metric, Scores, Task
from sealign.evaluation.statistics import Aim
from sealign.models.passages import Passage
from sealign.models.prompt_format import PromptFormat, PromptStyle
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from sealign.evaluation.harness import SealignLM

ANSWERS_VERSION = "1"
"""Version of the task; it changes with the definition of a metric."""

MAX_NEW_TOKENS = 64
"""Default of the maximum number of tokens of an answer."""

FLUENCY = Scorer(REPETITION, repetition, REPETITION)
"""Measure that is always taken."""

BATCH = 16


class AnswerTask:
    """Answers of all arms to prompts, collected arm by arm.

    Args:
        prompts: The prompts.
        prompt_format: How they are written.
        max_new_tokens: Maximum number of tokens of an answer.
    """

    def __init__(self, prompts: Sequence[Prompt], prompt_format: PromptFormat, max_new_tokens: int) -> None:
        self._prompts = list(prompts)
        self._format = prompt_format
        self._longest = max_new_tokens
        self._plain: list[list[int]] = []
        self._with_end: dict[str, list[list[int]]] = {}
        self._answers: dict[str, list[ArmAnswer]] = {}

    def add_arm(self, arm: str, lm: SealignLM) -> None:
        """Let one arm answer all prompts; the base model is the first.

        Args:
            arm: Name of the arm.
            lm: The model with the edit of the arm.

        Raises:
            SettingError: A prompt has no room for an answer in the context of the model.
        """
        encoded = self._encoded(lm)
        if arm == BASE:
            self._plain = encoded
        found = lm.answer(encoded, self._longest)
        ends = set(lm.end_tokens)
        self._with_end[arm] = found
        self._answers[arm] = []
        for prompt, ids in zip(self._prompts, found, strict=True):
            kept = tuple(ids[:-1] if ids[-1] in ends else ids)
            text = str(lm.tokenizer.decode(kept, skip_special_tokens=True)).strip()
            self._answers[arm].append(ArmAnswer(arm, prompt, text, kept))

    def _encoded(self, lm: SealignLM) -> list[list[int]]:
        """Return the token ids of the prompts; text that belongs before prompts becomes a few-shot preamble."""
        written = self._format.resolve(lm.tokenizer)
        if lm.prefix:
            style: PromptStyle = "few_shot_chat" if written.style.endswith("chat") else "few_shot"
            arguments = written.chat_template_kwargs
            written = PromptFormat(
                style, lm.prefix.strip(), arguments if style == "few_shot_chat" else {}, written.date
            )
        encoded = [written.encode_prompt(lm.tokenizer, prompt.text, history=prompt.history) for prompt in self._prompts]
        for number, ids in enumerate(encoded, start=1):
            if len(ids) + self._longest > lm.max_length:
                raise SettingError(
                    f"prompt {number} of {len(encoded)} is {len(ids)} tokens long, but the context of the model is "
                    f"{lm.max_length} tokens including {self._longest} of the answer; shorten it, or allow fewer "
                    "tokens for the answer"
                )
        return encoded

    @property
    def passages(self) -> list[Passage]:
        """The base model's own answers after their prompts, without empty ones."""
        return [
            Passage((*prompt, *answer.ids), len(prompt))
            for prompt, answer in zip(self._plain, self._answers.get(BASE, []), strict=True)
            if answer.ids
        ]

    def measure(
        self,
        base: SealignLM,
        measures: Sequence[AnswerMeasure],
        aims: Mapping[str, Aim],
        *,
        journal: Journal,
        judge: PairJudge | None = None,
        track: Track = no_progress,
    ) -> Task:
        """Return the task with the scores of all answers.

        Two metrics are always there: ``loss``, the mean of -log p(token | prompt, earlier tokens) of the *base* model
        over the tokens of an answer with its end token, in nats per token; and ``repetition``, the share of sequences
        of 4 tokens that occurred before. A judge adds ``judge_preference``; see ``compare_with_base``. Verdicts depend
        on metrics with an aim.

        Args:
            base: The base model.
            measures: Measures to take.
            aims: Mapping from the name of a metric to the values that are good.
            journal: Journal of the scores.
            judge: Judge that compares the answers of each arm with those of the base model; None for none.
            track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.

        Raises:
            MeasureError: A measure fails for an answer.
            JudgeError: The judge does not answer, or its answer has the wrong form.
        """
        hashes = [prompt.hash for prompt in self._prompts]
        task = Task(
            version=ANSWERS_VERSION,
            questions=["\n\n".join([*(turn.content for turn in p.history), p.text]) for p in self._prompts],
            groups=hashes if len(set(hashes)) < len(hashes) else None,
            answers={arm: [answer.text for answer in answers] for arm, answers in self._answers.items()},
        )
        taken = [*measures, *([] if any(each.name == FLUENCY.name for each in measures) else [FLUENCY])]
        for measure in taken:
            scores = _scores(measure, [a for answers in self._answers.values() for a in answers], journal, track)
            self._add(task, measure.name, scores, aims.get(measure.name))
        self._add(task, LOSS, self._losses(base), aims.get(LOSS))
        if judge is not None:
            found, note = compare_with_base(self._answers, judge, track=track)
            self._add(task, JUDGED, found, "higher")
            task.notes.append(note)
        return task

    def _losses(self, base: SealignLM) -> list[float]:
        """Return the loss under the base model of the answers of all arms in turn."""
        requests: Any = [
            (("", ""), prompt, answer)
            for answers in self._with_end.values()
            for prompt, answer in zip(self._plain, answers, strict=True)
        ]
        scored = base.score_tokens(requests)
        return [-value / len(answer) for (value, _), (_, _, answer) in zip(scored, requests, strict=True)]

    def _add(self, task: Task, name: str, scores: Sequence[float], aim: Aim) -> None:
        """Add one metric, given the scores of all arms in turn."""
        count = len(self._prompts)
        metric = Metric(items=list(range(count)), aim=aim, scale=1.0, offset=0.0, headline=aim is not None)
        for number, arm in enumerate(self._answers):
            of_arm = np.array(scores[number * count : (number + 1) * count], dtype=np.float64)
            metric.arms[arm] = Scores.of(ItemScores(np.arange(count), of_arm, aim=aim))
        task.metrics[name] = metric


def _scores(measure: AnswerMeasure, answers: Sequence[ArmAnswer], journal: Journal, track: Track) -> list[float]:
    """Return the score of each answer; equal answers to one prompt are scored once."""
    keys = [Journal.key("measure", measure.identity, answer.prompt.hash, answer.text, answer.ids) for answer in answers]
    waiting = {key: answer for key, answer in zip(keys, answers, strict=True) if key not in journal}
    items = list(waiting.items())
    batches = [items[first : first + BATCH] for first in range(0, len(items), BATCH)]
    for batch in track(batches, f"Measuring {measure.name}", len(batches)):
        found = measure.score([answer for _, answer in batch])
        journal.put({key: float(score) for (key, _), score in zip(batch, found, strict=True)})
    return [float(journal.get(key)) for key in keys]
