"""Demonstration: a prompt with a positive and a negative completion."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from sealign.errors import DemonstrationError


@dataclass(frozen=True)
class Demonstration:
    """A prompt with a positive (wanted) and a negative (unwanted) completion.

    Attributes:
        prompt: Text of the user, without a chat template.
        positive: Completion to make more likely.
        negative: Completion to make less likely. Must differ from ``positive``.

    Raises:
        DemonstrationError: A field is empty or contains a lone surrogate, or both completions are equal.

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
                raise DemonstrationError(f"'{name}' is {value!r}, but it must be a non-empty string")
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise DemonstrationError(
                    f"'{name}' is {value!r}, which contains a lone surrogate (half a character); replace or delete it"
                )
        if self.positive.strip() == self.negative.strip():
            raise DemonstrationError(
                f"positive and negative are both {self.positive.strip()!r}, but they must differ; change one of them"
            )

    def __str__(self) -> str:
        """Return the beginning of the prompt, which identifies the demonstration in messages."""
        return repr(textwrap.shorten(self.prompt, 60, placeholder="..."))


def demonstrations_hash(demonstrations: Iterable[Demonstration]) -> str:
    """Return the SHA-256 of demonstrations in their order, as 64 hexadecimal digits.

    Example:
        >>> demonstrations_hash([Demonstration("a", "b", "c")])[:8]
        'd33b202c'
    """
    digest = hashlib.sha256()
    for item in demonstrations:
        digest.update(json.dumps([item.prompt, item.positive, item.negative]).encode())
    return digest.hexdigest()
