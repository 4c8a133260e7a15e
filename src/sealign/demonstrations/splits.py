"""Split of demonstrations into a part to fit on and a part held out for measuring."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
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

    All demonstrations of one prompt are on one side, and so are all prompts of one topic where topics are given. The
    choice depends on the prompts, the topics and the seed, not on the order.

    Args:
        demonstrations: Demonstrations of at least 2 prompts or, where topics are given, 2 topics.
        holdout: Fraction of the prompts to hold out, rounded to whole prompts or topics, at least 1 on each side. Must
            be above 0 and below 1.
        seed: Seed of the choice.

    Raises:
        DemonstrationError: The fraction is out of range, or there are fewer than 2 prompts or topics.

    Example:
        >>> from sealign.demonstrations.sources import load_demonstrations
        >>> fitted, held_out = split_demonstrations(load_demonstrations("bundled:fairness"), holdout=0.25)
        >>> round(len(held_out) / len(fitted + held_out), 2)
        0.25
    """
    Holdout(holdout, seed)  # checks the fraction
    groups: dict[str, str] = {}  # a prompt with several topics goes with the first in the alphabet
    for item in demonstrations:
        group = item.topic or item.prompt_hash
        groups[item.prompt_hash] = min(group, groups.get(item.prompt_hash, group))
    sizes = Counter(groups.values())
    if len(sizes) < 2:
        raise DemonstrationError(
            f"there are demonstrations of {len(sizes)} prompts or topics, but a split needs at least 2; add some"
        )
    shuffled = sorted(sizes, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
    totals = list(accumulate(sizes[group] for group in shuffled[:-1]))
    number = min(range(len(totals)), key=lambda index: abs(totals[index] - holdout * len(groups))) + 1
    chosen = set(shuffled[:number])
    held_out = [item for item in demonstrations if groups[item.prompt_hash] in chosen]
    return [item for item in demonstrations if groups[item.prompt_hash] not in chosen], held_out
