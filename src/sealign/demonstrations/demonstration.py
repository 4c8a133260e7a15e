"""Demonstration: a prompt with a wanted and an unwanted completion."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from sealign.errors import DemonstrationError


@dataclass(frozen=True)
class Demonstration:
    """A prompt with a positive (wanted) and a negative (unwanted) completion.

    Attributes:
        prompt: what the user says, without a chat template.
        positive: the completion to be made more likely.
        negative: the completion to be made less likely; differs from ``positive``.

    Raises:
        DemonstrationError: a field is empty or holds half a character, or both completions are the same.

    Example:
        >>> Demonstration("What do bees make?", "Honey.", "Milk.").positive
        'Honey.'
    """

    prompt: str
    positive: str
    negative: str

    def __post_init__(self) -> None:
        for name in ("prompt", "positive", "negative"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise DemonstrationError(f"'{name}' is {value!r}, but it must be a text that is not empty")
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise DemonstrationError(
                    f"'{name}' is {value!r}, which holds half a character (a lone surrogate); write it out or delete it"
                )
        if self.positive.strip() == self.negative.strip():
            raise DemonstrationError(
                f"positive and negative are both {self.positive.strip()!r}; they must differ to teach a direction"
            )

    def __str__(self) -> str:
        """By which a user finds it again, whatever part of a list it is in: how its prompt begins."""
        return repr(textwrap.shorten(self.prompt, 60, placeholder="..."))


def demonstrations_hash(demonstrations: Sequence[Demonstration]) -> str:
    """Return the SHA-256 of the demonstrations, in order, as 64 hexadecimal digits.

    Example:
        >>> demonstrations_hash([Demonstration("a", "b", "c")])[:8]
        'd33b202c'
    """
    digest = hashlib.sha256()
    for item in demonstrations:
        digest.update(json.dumps([item.prompt, item.positive, item.negative]).encode())
    return digest.hexdigest()
