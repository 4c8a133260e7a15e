"""Demonstration: a prompt with a positive and a negative completion."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from typing import Literal, NamedTuple, get_args

from sealign.errors import DemonstrationError

Role = Literal["system", "user", "assistant"]

HASH_DIGITS = 16
"""Number of hexadecimal digits of each half of a demonstration's hash."""


class Turn(NamedTuple):
    """A turn of a conversation.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        content: Text of the turn.
    """

    role: Role
    content: str


@dataclass(frozen=True)
class Demonstration:
    """A prompt with a positive (wanted) and a negative (unwanted) completion.

    Attributes:
        prompt: Text of the user, without a chat template.
        positive: Completion to make more likely.
        negative: Completion to make less likely. Must differ from ``positive``.
        history: Turns before the prompt, such as a system message; empty for most demonstrations.
        topic: Subject of the prompt. Demonstrations of one topic are held out together; see ``split_demonstrations``.

    Raises:
        DemonstrationError: A field is empty or contains a lone surrogate, both completions are equal, or a turn has an
            unknown role.

    Example:
        >>> Demonstration("What do bees make?", "Honey.", "Milk.").positive
        'Honey.'
    """

    prompt: str
    positive: str
    negative: str
    history: tuple[Turn, ...] = ()
    topic: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "positive", "negative"):
            check_text(name, getattr(self, name))
        check_history(self.history)
        if self.topic is not None:
            check_text("topic", self.topic)
        if self.positive.strip() == self.negative.strip():
            raise DemonstrationError(
                f"positive and negative are both {self.positive.strip()!r}, but they must differ; change one of them"
            )

    def __str__(self) -> str:
        """Return the beginning of the prompt, which identifies the demonstration in messages."""
        return repr(textwrap.shorten(self.prompt, 60, placeholder="..."))

    @property
    def prompt_hash(self) -> str:
        """``prompt_hash`` of the prompt and its history."""
        return prompt_hash(self.prompt, self.history)

    @property
    def hash(self) -> str:
        """``prompt_hash``, a hyphen, and 16 digits of the SHA-256 of both completions: equal for equal texts only.

        Whitespace around a text does not count.
        """
        return f"{self.prompt_hash}-{_short_hash([self.positive, self.negative])}"


def prompt_hash(prompt: str, history: Iterable[Turn] = ()) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a prompt with the turns before it.

    Whitespace around a text does not count.

    Args:
        prompt: The prompt.
        history: Earlier turns of the conversation.

    Example:
        >>> prompt_hash("Who? ") == prompt_hash("Who?")
        True
    """
    return _short_hash([prompt, *history])


def check_history(history: Iterable[Turn]) -> None:
    """Raise an error if a turn has an unknown role or no text.

    Raises:
        DemonstrationError: A role is unknown, or a content is empty or contains a lone surrogate.
    """
    for role, content in history:
        if role not in get_args(Role):
            raise DemonstrationError(f"a turn has the role {role!r}, but it must be system, user or assistant")
        check_text(f"a turn of the {role}", content)


def check_text(name: str, value: object) -> None:
    """Raise an error if a value is no text, empty, or contains a lone surrogate.

    Args:
        name: Name of the value, for the message.
        value: Value to check.

    Raises:
        DemonstrationError: The value is no such text.
    """
    if not isinstance(value, str) or not value.strip():
        raise DemonstrationError(f"'{name}' is {value!r}, but it must be a non-empty string")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DemonstrationError(
            f"'{name}' is {value!r}, which contains a lone surrogate (half a character); replace or delete it"
        )


def _short_hash(texts: Iterable[str | Turn]) -> str:
    stripped = [text.strip() if isinstance(text, str) else [text[0], text[1].strip()] for text in texts]
    return hashlib.sha256(json.dumps(stripped).encode()).hexdigest()[:HASH_DIGITS]


def demonstrations_hash(demonstrations: Iterable[Demonstration]) -> str:
    """Return the SHA-256 of demonstrations in their order, as 64 hexadecimal digits.

    Example:
        >>> demonstrations_hash([Demonstration("a", "b", "c")])[:8]
        'd33b202c'
    """
    digest = hashlib.sha256()
    for item in demonstrations:
        history = [item.history] if item.history else []
        digest.update(json.dumps([item.prompt, item.positive, item.negative, *history]).encode())
    return digest.hexdigest()


def check_demonstrations(items: Iterable[Demonstration]) -> tuple[Demonstration, ...]:
    """Return demonstrations as a tuple.

    Args:
        items: Any iterable of demonstrations, which is read once.

    Raises:
        DemonstrationError: ``items`` is a path, or an item is no demonstration.

    Example:
        >>> len(check_demonstrations(Demonstration("a", f"{number}", "c") for number in range(3)))
        3
    """
    if isinstance(items, str | PathLike) or not isinstance(items, Iterable):
        raise DemonstrationError(
            f"demonstrations is {items!r}, but it must be a sequence of demonstrations; read files and named sets with "
            "load_demonstrations"
        )
    found = tuple(items)
    for number, item in enumerate(found):
        if not isinstance(item, Demonstration):
            raise DemonstrationError(
                f"demonstrations[{number}] is of type {type(item).__name__}, but it must be a Demonstration; make one "
                "with Demonstration(prompt, positive, negative)"
            )
    return found
