"""Samples of a task as lm-evaluation-harness records them: questions, answers and scores of its items."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sealign.evaluation.item_scores import ItemScores, Sample, item_scores


@dataclass(frozen=True)
class TaskSamples:
    """The samples of a task, or of all tasks of a group, from one filter.

    Attributes:
        task: Name of the task or group.
        version: Version in the harness.
        parts: Samples by name of the task; several for a group.
        higher_is_better: Mapping from metric to whether higher values are better.
    """

    task: str
    version: str
    parts: Mapping[str, Sequence[Sample]]
    higher_is_better: Mapping[str, bool | None]

    @classmethod
    def of(cls, task: str, found: Any) -> TaskSamples:
        """Return the samples of a task.

        Args:
            task: Name of the task or group.
            found: Result of the harness's ``evaluate`` or ``simple_evaluate``.
        """
        return cls(
            task,
            str(next(iter(found["versions"].values()))),
            {name: _one_filter(samples) for name, samples in found["samples"].items()},
            next(iter(found["higher_is_better"].values())),
        )

    @functools.cached_property
    def samples(self) -> list[Sample]:
        """Samples of all parts, with ``doc_id`` counted over all of them."""
        joined = (sample for part in self.parts.values() for sample in part)
        return [{**sample, "doc_id": index} for index, sample in enumerate(joined)]

    @property
    def docs(self) -> list[Any]:
        """Data of each item."""
        return [sample["doc"] for sample in self.samples]

    @property
    def questions(self) -> list[str]:
        """Text of each question, without few-shot examples."""
        return [_question(sample) for sample in self.samples]

    @property
    def answers(self) -> list[str]:
        """Answer to each item: the most probable choice, or the generated text."""
        return [_answer(sample) for sample in self.samples]

    @property
    def groups(self) -> list[str] | None:
        """Label of each item; items of one label are resampled together. None if all items are independent.

        The items of one BBQ template are variants of one question.
        """
        if self.task != "bbq":
            return None
        return [f"{doc['category']} {doc['question_index']}" for doc in self.docs]

    def scores(self) -> dict[str, ItemScores]:
        """Return the scores of all metrics by name; for a group, also by task."""
        found = item_scores(self.task, self.samples, self.higher_is_better)
        return found | (self._by_part(found) if len(self.parts) > 1 else {})

    def _by_part(self, scores: Mapping[str, ItemScores]) -> dict[str, ItemScores]:
        found = {}
        for metric, values in scores.items():
            start = 0
            for part, samples in self.parts.items():
                chosen = (values.items >= start) & (values.items < start + len(samples))
                start += len(samples)
                found[f"{metric}/{part.removeprefix(self.task + '_')}"] = values.select(chosen)
        return found


def _one_filter(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples of the last filter, which is the most lenient if a task has several, as gsm8k has."""
    last = samples[-1]["filter"]
    return sorted((s for s in samples if s["filter"] == last), key=lambda sample: int(sample["doc_id"]))


def _question(sample: Sample) -> str:
    doc = sample["doc"]
    for names in (("context", "question"), ("question",), ("sent_more",), ("query",), ("Problem",), ("text",)):
        if all(isinstance(doc.get(name), str) for name in names):
            return " ".join(str(doc[name]) for name in names)
    return str(sample["arguments"][0][0]).rsplit("\n\n", 1)[-1]


def _answer(sample: Sample) -> str:
    responses = sample["resps"]
    if isinstance(responses[0][0], str):
        return str(responses[0][0]).strip()
    best = int(np.argmax([replies[0][0] for replies in responses]))
    return str(sample["arguments"][best][1]).strip()
