"""Settings of an evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, PlainSerializer, ValidationInfo, field_validator, model_validator

from sealign.configuration import Config
from sealign.demonstrations.demonstration import Demonstration, Turn, demonstrations_hash
from sealign.demonstrations.prompts import Prompt
from sealign.errors import SettingError, check_choice
from sealign.evaluation.answer_measures import ALWAYS, RESERVED, AnswerMeasure
from sealign.evaluation.journal import Journal
from sealign.evaluation.judge import Judge
from sealign.evaluation.judged_pairs import CRITERION
from sealign.evaluation.statistics import Aim
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


HashedPrompts = Annotated[
    Sequence[Prompt] | None,
    PlainSerializer(lambda prompts: None if prompts is None else Journal.key([prompt.hash for prompt in prompts])),
]
"""Prompts, or None; a configuration is dumped with their hash."""

NamedMeasures = Annotated[
    Sequence[AnswerMeasure],
    PlainSerializer(lambda measures: {measure.name: measure.identity for measure in measures}),
]
"""Measures of answers; a configuration is dumped with what identifies each."""


class TaskConfig(Config):
    """Settings common to evaluation and tuning: the tasks and their data.

    Attributes:
        tasks: Names of tasks of lm-evaluation-harness, or ``halueval_qa``; must not repeat a name.
        data_dir: Folder with the data of the tasks in the schemas of the Hub; None loads them from the Hub.
        limit: Use only the first ``limit`` items of each task. Must be at least 1; None uses all.

    Raises:
        SettingError: A task is named twice, a value is out of range, or there are no tasks for ``data_dir`` or
            ``limit``.
    """

    tasks: Sequence[str] = ()
    data_dir: Path | None = None
    limit: Annotated[int, Field(ge=1)] | None = None

    @field_validator("tasks")
    @classmethod
    def _check_tasks(cls, tasks: Any) -> Any:
        check_unique("task", tasks)
        return tasks

    @model_validator(mode="after")
    def _check_task_settings(self) -> Self:
        for name in ("data_dir", "limit"):
            if (value := getattr(self, name)) is not None and not self.tasks:
                raise SettingError(f"{name} is {value}, but it is for tasks, of which there are none; leave it out")
        return self


class EvaluationConfig(TaskConfig):
    """Settings of an evaluation; see ``TaskConfig`` for the tasks.

    Attributes:
        demonstrations: Demonstrations on which the preference for the positive completion is scored; None leaves the
            preference out. With them, damage is measured on the base model's own answers to their prompts, too.
        prompt_format: How the prompts of ``demonstrations`` are written.
        items: Mapping from task to the numbers of the items to score, instead of ``limit``.
        neutral_texts: At least 2 texts of 2 tokens or more, on which damage is measured; the bundled texts if None.
        control_seeds: Seeds of the random controls, one control per seed; empty for no random controls.
        reversed_control: Whether to evaluate the reversal of each edit as a control.
        preamble: Text put before every prompt, in every arm.
        max_new_tokens: Mapping from task to the maximum number of tokens of an answer, which replaces the limit of the
            task.
        batch_size: Number of sequences to run together in generation. Must be at least 1.
        judge: Judge that scores truthfulness and informativeness for ``truthfulqa_gen``, and compares the answers to
            ``prompts`` with those of the base model; None leaves both out.
        prompts: Open-ended prompts that every arm answers greedily; None leaves them out. The limit of the answers is
            ``max_new_tokens["answers"]``, by default 64 tokens.
        measures: Measures of these answers, beside their loss under the base model and their repetition.
        aims: Mapping from the name of a measure, ``loss`` or ``repetition`` to the values that are good: ``higher``,
            ``lower`` or a number. Verdicts do not depend on measures without an aim.
        criterion: What the judge compares answers by.
        strengths: Strengths at which each edit is evaluated, with controls at each; empty for its own strength alone.
        apply_chat_template: Whether the prompts of tasks of the harness are written with the chat template.
        num_fewshot: Number of worked examples before each item of tasks of the harness, instead of the task's own.
        system_instruction: System message of all prompts; text before those without a chat template.

    Raises:
        SettingError: A value is unknown or out of range, there is nothing to score, or a setting would have no effect.

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
    prompts: HashedPrompts = None
    measures: NamedMeasures = ()
    aims: Mapping[str, Aim] = {}
    criterion: str = CRITERION
    strengths: Sequence[float] = ()
    apply_chat_template: bool = False
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    system_instruction: str | None = None

    def instructed(self) -> EvaluationConfig:
        """Return the configuration with the system instruction before the turns of demonstrations and prompts."""
        text = self.system_instruction
        if text is None:
            return self

        def history(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
            # As in the harness, where the instruction precedes a description that the task brings.
            own = f"\n\n{turns[0].content}" if turns and turns[0].role == "system" else ""
            return (Turn("system", text + own), *turns[1 if own else 0 :])

        items, prompts = self.demonstrations, self.prompts
        return self.replace(
            demonstrations=items and [dataclasses.replace(item, history=history(item.history)) for item in items],
            prompts=prompts and [Prompt(prompt.text, history(prompt.history)) for prompt in prompts],
        )

    @model_validator(mode="after")
    def _check_scored(self) -> EvaluationConfig:
        if not self.tasks and not self.demonstrations and not self.prompts:
            raise SettingError(
                "there are no tasks, no demonstrations and no prompts to score; name a task, such as truthfulqa_mc2, "
                "give demonstrations that no edit was fitted on, or prompts to answer"
            )
        if self.prompts is not None and len(self.prompts) < 2:
            raise SettingError(f"there is {len(self.prompts)} prompt, but intervals need at least 2; give more")
        return self

    @model_validator(mode="after")
    def _check_measures(self) -> EvaluationConfig:
        if (self.measures or self.aims) and not self.prompts:
            raise SettingError("measures and aims are those of answers to prompts, but there are none; give prompts")
        names = [each.name for each in self.measures]
        check_unique("measure", names)
        for name in names:
            if name in RESERVED:
                raise SettingError(
                    f"a measure is named '{name}', which is a metric of every answer; choose another name"
                )
        for name in self.aims:
            check_choice("measure", name, dict.fromkeys([*names, *ALWAYS]))
        return self

    @model_validator(mode="after")
    def _check_harness(self) -> EvaluationConfig:
        if self.apply_chat_template and self.preamble:
            raise SettingError("a preamble would stand before the chat template; leave out one of the two")
        return self

    @field_validator("aims", mode="before")
    @classmethod
    def _check_aims(cls, aims: Any) -> Any:
        for name, aim in aims.items() if isinstance(aims, Mapping) else ():
            if isinstance(aim, str) and aim not in ("higher", "lower"):
                raise SettingError(f"the aim of '{name}' is '{aim}', but it must be higher, lower or a number")
        return aims

    @field_validator("control_seeds", "strengths")
    @classmethod
    def _check_numbers(cls, numbers: Any, info: ValidationInfo) -> Any:
        check_unique({"control_seeds": "control seed", "strengths": "strength"}[str(info.field_name)], numbers)
        return numbers


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
