"""ICL, in-context learning: put demonstrations before every prompt."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import Field

from sealign.configuration import Config
from sealign.demonstrations.demonstration import Demonstration, Turn
from sealign.edits.handle import EditHandle
from sealign.errors import DemonstrationError
from sealign.methods.method import FitContext, Method, RecordedIntervention
from sealign.models.prompt_format import question_text


class ICLConfig(Config):
    """Settings of few-shot prompting.

    Attributes:
        shots: Number of demonstrations before each prompt. Must be at least 1; 4 in the paper's prompt for BBQ.
        instruction: Text put before the demonstrations.
        seed: Seed of the selection of demonstrations.

    Raises:
        SettingError: A value is out of range.

    Example:
        >>> ICLConfig(shots=2).shots
        2
    """

    shots: Annotated[int, Field(ge=1)] = 4
    instruction: str = ""
    seed: int = 0


class InContextLearning(RecordedIntervention):
    """Few-shot prompting: a few demonstrations as ``Q: prompt`` and ``A: positive`` before every prompt."""

    @property
    def prefix(self) -> str:
        """Text of the demonstrations, put before every prompt."""
        return str(self.settings["prefix"])

    def install(self, model: Any, handle: EditHandle) -> None:
        """Do nothing: the method changes prompts, not the model."""


def _fit(context: FitContext, config: ICLConfig) -> InContextLearning:
    found = list(context.demonstrations)
    if len(found) < config.shots:
        raise DemonstrationError(
            f"shots is {config.shots}, but there are {len(found)} demonstrations; give more, or fewer shots"
        )
    chosen = random.Random(config.seed).sample(found, config.shots)
    learned = {"prefix": few_shot_text(chosen, config.instruction)}
    return InContextLearning.build(context, ICL.name, config, learned=learned)


def few_shot_text(demonstrations: Iterable[Demonstration], instruction: str = "") -> str:
    r"""Return the prompts and positive completions as answered questions, to be followed by another question.

    Args:
        demonstrations: Demonstrations in the order of the text.
        instruction: Text before the first question.

    Example:
        >>> few_shot_text([Demonstration("What do bees make?", "Honey.", "Milk.")])
        'Q: What do bees make?\nA: Honey.\n\n'
    """
    shots = [
        question_text([*item.history, Turn("user", item.prompt), Turn("assistant", item.positive)])
        for item in demonstrations
    ]
    return (f"{instruction.strip()}\n\n" if instruction.strip() else "") + "".join(shots)


ICL = Method("icl", ICLConfig, InContextLearning, _fit)
"""In-context learning, by demonstrations before every prompt."""
