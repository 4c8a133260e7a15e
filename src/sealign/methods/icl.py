"""ICL: demonstrations in the context, before every prompt."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sealign.errors import DemonstrationError
from sealign.methods.method import Attached, FitContext, Method, check_at_least
from sealign.models.prompt_format import few_shot_text


@dataclass(frozen=True, kw_only=True)
class ICLConfig:
    """Settings of few-shot prompting.

    Attributes:
        shots: demonstrations in the context, at least 1; the paper's BBQ prompt has 4.
        instruction: text before them.
        seed: of their draw.

    Raises:
        SettingError: no shots.

    Example:
        >>> ICLConfig(shots=2).shots
        2
    """

    shots: int = 4
    instruction: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least("shots", self.shots, 1)


@dataclass(frozen=True, eq=False)
class ICL(Method):
    """Few-shot prompting: ``Q: prompt``, ``A: positive`` of a few demonstrations before every prompt."""

    name: ClassVar[str] = "icl"

    @classmethod
    def learn(cls, lesson: FitContext, config: ICLConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Draw the demonstrations and write them out.

        Raises:
            DemonstrationError: fewer demonstrations than shots.
        """
        found = list(lesson.demonstrations)
        if len(found) < config.shots:
            raise DemonstrationError(
                f"there are {len(found)} demonstrations, but {config.shots} shots were asked for; "
                "give more, or ask for fewer"
            )
        chosen = random.Random(config.seed).sample(found, config.shots)
        return {"prefix": few_shot_text(chosen, config.instruction)}, {}

    @property
    def prefix(self) -> str:
        """The demonstrations as text."""
        return str(self.settings["prefix"])

    def put_on(self, model: object, attached: Attached) -> None:
        """Leave the model as it is: the prompt is what changes."""
