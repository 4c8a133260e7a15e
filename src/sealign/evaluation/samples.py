"""One task's items as the harness recorded them: what was asked, answered and scored."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sealign.evaluation.item_scores import ItemScores, Sample, item_scores


@dataclass(frozen=True)
class TaskSamples:
    """The items of a task, of one filter, numbered through; several where the task is a group of the harness.

    Attributes:
        task: its name.
        version: in the harness.
        parts: by member of a group, or the task itself, the records of its items.
        higher_is_better: by metric, as the harness says.
    """

    task: str
    version: str
    parts: Mapping[str, Sequence[Sample]]
    higher_is_better: Mapping[str, bool | None]

    @classmethod
    def of(cls, task: str, found: Any) -> TaskSamples:
        """Return the items of a task from what ``simple_evaluate`` returned."""
        return cls(
            task,
            str(next(iter(found["versions"].values()))),
            {name: _one_filter(samples) for name, samples in found["samples"].items()},
            next(iter(found["higher_is_better"].values())),
        )

    @functools.cached_property
    def samples(self) -> list[Sample]:
        """All items, with ``doc_id`` numbered through."""
        joined = (sample for part in self.parts.values() for sample in part)
        return [{**sample, "doc_id": index} for index, sample in enumerate(joined)]

    @property
    def docs(self) -> list[Any]:
        """The data of each item."""
        return [sample["doc"] for sample in self.samples]

    @property
    def questions(self) -> list[str]:
        """What was asked, for people: without the few-shot examples."""
        return [_question(sample) for sample in self.samples]

    @property
    def answers(self) -> list[str]:
        """What was answered: the most probable choice, or what was generated."""
        return [_answer(sample) for sample in self.samples]

    @property
    def groups(self) -> list[str] | None:
        """A label of each item for what is resampled together; None where every item stands alone.

        Items of one BBQ template are variants of one question.
        """
        if self.task != "bbq":
            return None
        return [f"{doc['category']} {doc['question_index']}" for doc in self.docs]

    def scores(self) -> dict[str, ItemScores]:
        """Return every metric by name, for a group of tasks also by member."""
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
    """The samples of the last filter, the most lenient where a task has several, such as gsm8k's flexible one."""
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
