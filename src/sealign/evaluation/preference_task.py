"""The preference for positive completions as a task, scored by the harness's model with its journal."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sealign.demonstrations.demonstration import Demonstration
from sealign.errors import DemonstrationError
from sealign.evaluation.harness import SealignLM
from sealign.evaluation.item_scores import ItemScores
from sealign.evaluation.preference import HEADLINES, PREFERENCE, PREFERENCE_VERSION, length_note, preference_metrics
from sealign.evaluation.results import Task
from sealign.models.passages import completion_passages
from sealign.models.prompt_format import PromptFormat


def add_preference(
    tasks: dict[str, Task],
    arm: str,
    lm: SealignLM,
    demonstrations: Sequence[Demonstration],
    prompt_format: PromptFormat,
) -> None:
    """Add the preference of one arm for the positive completions of demonstrations.

    Args:
        tasks: Mapping from name to task; the task is added with the first arm.
        arm: Name of the arm.
        lm: The model with the edit of the arm.
        demonstrations: Demonstrations that no edit was fitted on.
        prompt_format: How prompts are written.

    Raises:
        DemonstrationError: A demonstration is longer than the context of the model.
    """
    if PREFERENCE not in tasks:
        groups = [item.prompt_hash for item in demonstrations]
        tasks[PREFERENCE] = Task(
            version=PREFERENCE_VERSION,
            questions=[item.prompt for item in demonstrations],
            groups=groups if len(set(groups)) < len(groups) else None,
            notes=[note] if (note := length_note(lm.tokenizer, demonstrations)) else [],
        )
    scores = _preference(lm, demonstrations, prompt_format)
    margins = scores["preference_margin"].numerators
    tasks[PREFERENCE].answers[arm] = [
        item.positive if margin > 0 else item.negative for item, margin in zip(demonstrations, margins, strict=True)
    ]
    for metric, values in scores.items():
        tasks[PREFERENCE].add_scores(metric, arm, values, headline=metric in HEADLINES)


def _preference(
    lm: SealignLM, demonstrations: Sequence[Demonstration], prompt_format: PromptFormat
) -> dict[str, ItemScores]:
    """Return the metrics of ``preference_scores``, with scores that the journal of the model keeps."""
    read = [dataclasses.replace(item, prompt=lm.prefix + item.prompt) for item in demonstrations]
    pairs = completion_passages(lm.tokenizer, read, prompt_format=prompt_format)
    passages = [passage for pair in pairs for passage in pair]
    for item, passage in zip([item for item in demonstrations for _ in range(2)], passages, strict=True):
        if len(passage.ids) > lm.max_length:
            raise DemonstrationError(
                f"the demonstration {item} is {len(passage.ids)} tokens long, but the context of the model is "
                f"{lm.max_length} tokens; shorten it or leave it out"
            )
    found = lm.score_tokens([(("", ""), list(p.ids[: p.start]), list(p.ids[p.start :])) for p in passages])
    return preference_metrics([value for value, _ in found], [passage.count for passage in passages])
