"""Split of demonstrations into a part to fit on and a part held out for measuring."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sealign.demonstrations.demonstration import Demonstration
from sealign.errors import DemonstrationError
from sealign.record_files import RECORD_CONFIG


@dataclass(frozen=True)
class Holdout:
    """The part of the demonstrations that a fit leaves out.

    Attributes:
        fraction: Fraction of the prompts to hold out. Must be above 0 and below 1.
        seed: Seed of the choice.

    Raises:
        DemonstrationError: The fraction is out of range.
    """

    __pydantic_config__: ClassVar[Any] = RECORD_CONFIG
    fraction: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise DemonstrationError(f"holdout is {self.fraction}, but it must be above 0 and below 1")


def split_demonstrations(
    demonstrations: Sequence[Demonstration], *, holdout: float = 0.3, seed: int = 0
) -> tuple[list[Demonstration], list[Demonstration]]:
    """Return the demonstrations to fit on and those held out, each in the given order.

    All demonstrations of one prompt are on one side. The choice depends on the prompts and the seed, not on the order.

    Args:
        demonstrations: Demonstrations of at least 2 prompts.
        holdout: Fraction of the prompts to hold out, rounded to whole prompts, at least 1 on each side. Must be above 0
            and below 1.
        seed: Seed of the choice.

    Raises:
        DemonstrationError: The fraction is out of range, or there are fewer than 2 prompts.

    Example:
        >>> from sealign.demonstrations.sources import load_demonstrations
        >>> fitted, held_out = split_demonstrations(load_demonstrations("bundled:fairness"), holdout=0.25)
        >>> round(len(held_out) / len(fitted + held_out), 2)
        0.25
    """
    Holdout(holdout, seed)  # checks the fraction
    prompts = {item.prompt_hash for item in demonstrations}
    if len(prompts) < 2:
        raise DemonstrationError(
            f"there are demonstrations of {len(prompts)} prompts, but holding some out needs at least 2; add some"
        )
    shuffled = sorted(prompts, key=lambda prompt: hashlib.sha256(f"{seed}:{prompt}".encode()).digest())
    held_out = set(shuffled[: min(max(1, round(holdout * len(prompts))), len(prompts) - 1)])
    fitted = [item for item in demonstrations if item.prompt_hash not in held_out]
    return fitted, [item for item in demonstrations if item.prompt_hash in held_out]
