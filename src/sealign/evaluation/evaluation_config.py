"""Settings of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PlainSerializer, field_validator, model_validator

from sealign.configuration import Config
from sealign.demonstrations.demonstration import Demonstration, demonstrations_hash
from sealign.errors import SettingError
from sealign.evaluation.judge import Judge
from sealign.models.prompt_format import PromptFormat

CONTROL_SEEDS = (0, 1, 2)
"""Seeds of the random controls of an edit."""

NamedJudge = Annotated[Judge | None, PlainSerializer(lambda judge: None if judge is None else judge.name)]
"""A judge, or None; a configuration is dumped with its name."""


HashedDemonstrations = Annotated[
    Sequence[Demonstration] | None,
    PlainSerializer(lambda items: None if items is None else demonstrations_hash(items)),
]
"""Demonstrations, or None; a configuration is dumped with their hash."""


class TaskConfig(Config):
    """Settings common to evaluation and tuning: the tasks and their data.

    Attributes:
        tasks: Names of tasks of lm-evaluation-harness, or ``halueval_qa``; must not repeat a name.
        data_dir: Folder with the data of the tasks in the schemas of the Hub; None loads them from the Hub.
        limit: Use only the first ``limit`` items of each task. Must be at least 1; None uses all.

    Raises:
        SettingError: A task is named twice, or a value is out of range.
    """

    tasks: Sequence[str] = ()
    data_dir: Path | None = None
    limit: Annotated[int, Field(ge=1)] | None = None

    @field_validator("tasks")
    @classmethod
    def _check_tasks(cls, tasks: Any) -> Any:
        check_unique("task", tasks)
        return tasks


class EvaluationConfig(TaskConfig):
    """Settings of an evaluation; see ``TaskConfig`` for the tasks.

    Attributes:
        demonstrations: Demonstrations on which the preference for the positive completion is scored; None leaves the
            preference out. With them, damage is measured on the base model's own answers to their prompts, too.
        prompt_format: How the prompts of ``demonstrations`` are written.
        items: Mapping from task to the numbers of the items to score, instead of ``limit``.
        neutral_texts: Texts on which damage is measured; the bundled texts if None.
        control_seeds: Seeds of the random controls, one control per seed; empty for no random controls.
        reversed_control: Whether to evaluate the reversal of each edit as a control.
        preamble: Text put before every prompt, in every arm.
        max_new_tokens: Mapping from task to the maximum number of tokens of an answer, which replaces the limit of the
            task.
        batch_size: Number of sequences to run together in generation. Must be at least 1.
        judge: Judge that scores truthfulness and informativeness for ``truthfulqa_gen``; None leaves both out.

    Raises:
        SettingError: A value is unknown or out of range, or there are neither tasks nor demonstrations.

    Example:
        >>> EvaluationConfig(tasks=["truthfulqa_mc2"], limit=20).control_seeds
        (0, 1, 2)
    """

    demonstrations: HashedDemonstrations = None
    prompt_format: PromptFormat = PromptFormat()
    items: Mapping[str, Sequence[int]] | None = None
    neutral_texts: Sequence[str] | None = None
    control_seeds: Sequence[int] = CONTROL_SEEDS
    reversed_control: bool = True
    preamble: str = ""
    max_new_tokens: Mapping[str, int] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 8
    judge: NamedJudge = None

    @model_validator(mode="after")
    def _check_scored(self) -> EvaluationConfig:
        if not self.tasks and not self.demonstrations:
            raise SettingError(
                "there are no tasks and no demonstrations to score; name a task, such as truthfulqa_mc2, or give "
                "demonstrations that no edit was fitted on"
            )
        return self

    @field_validator("control_seeds")
    @classmethod
    def _check_seeds(cls, seeds: Any) -> Any:
        check_unique("control seed", seeds)
        return seeds


def check_unique(kind: str, values: Sequence[Any]) -> None:
    """Raise an error if a value occurs more than once.

    Args:
        kind: Name of the values, for the message.
        values: Values to check.

    Raises:
        SettingError: A value occurs more than once.
    """
    for value in values:
        if (count := list(values).count(value)) > 1:
            raise SettingError(f"{kind} '{value}' is named {count} times; name it once")
