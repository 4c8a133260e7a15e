"""Rows of preference data sets as demonstrations: texts or messages, under the usual or other names of columns."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sealign.demonstrations.demonstration import Demonstration, Turn
from sealign.demonstrations.row_files import Row
from sealign.errors import DemonstrationError, unknown_name

Parse = Callable[[Row, random.Random], Demonstration | None]
"""Function of a row and a random generator that returns the demonstration, or None to leave the row out."""

_USUAL = {"prompt": ("prompt",), "positive": ("positive", "chosen"), "negative": ("negative", "rejected")}


def preference_parser(columns: Mapping[str, str] | None = None) -> Parse:
    """Return the function that makes a demonstration from a row.

    A completion is a text, a list of texts, of which one is drawn, or messages that end with the assistant's. A prompt
    is a text, or messages that end with the user's; the messages before are the history. If the completions are whole
    conversations, their common beginning is the prompt.

    Args:
        columns: Mapping from ``prompt``, ``positive`` or ``negative`` to the name of its column, where it is not
            ``prompt``, ``positive`` or ``chosen``, ``negative`` or ``rejected``.

    Raises:
        DemonstrationError: ``columns`` maps another name.
    """
    given = dict(columns or {})
    for name in given:
        if name not in _USUAL:
            raise DemonstrationError(unknown_name("part of a demonstration", name, _USUAL))
    names = _USUAL | {part: (column,) for part, column in given.items()}

    def parse(row: Row, generator: random.Random) -> Demonstration:
        positive, negative = (_value(row, names[part], generator) for part in ("positive", "negative"))
        prompt, other = (value[:-1] if isinstance(value, list) else [] for value in (positive, negative))
        if prompt != other:
            raise DemonstrationError("the conversations of both completions must be equal up to their last message")
        if not any(turn.role == "user" for turn in prompt):
            value = _value(row, names["prompt"], generator)
            prompt = prompt + (value if isinstance(value, list) else [Turn("user", value)])
        return _demonstration(prompt, _completion(positive), _completion(negative), row.get("topic") or None)

    return parse


def _value(row: Row, names: Sequence[str], generator: random.Random) -> Any:
    """Return the value of the first column that a row has: a text, or messages as turns."""
    name = next((name for name in names if name in row), None)
    if name is None:
        wanted, found = " or ".join(map(repr, names)), ", ".join(map(str, row)) or "none"
        raise DemonstrationError(f"no key {wanted}, found {found}; add or rename it, or name it by columns (--columns)")
    value = row[name]
    if not isinstance(value, list):
        return value
    if value and all(isinstance(item, str) for item in value):
        return generator.choice(value)
    if not value:
        raise DemonstrationError(f"'{name}' is an empty list; give a text or messages")
    return message_turns(name, value)


def message_turns(name: str, messages: Sequence[Any]) -> list[Turn]:
    """Return messages, objects with a role and a content, as turns.

    Args:
        name: Name of the column, for error messages.
        messages: The messages; a content is a text or a list of parts of the type ``text``.

    Raises:
        DemonstrationError: A message has no role or content, or a part that is no text.
    """
    return [_turn(name, message) for message in messages]


def _turn(name: str, message: Any) -> Turn:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise DemonstrationError(f"'{name}' has the item {message!r:.60}, but a message needs a role and a content")
    content = message["content"]
    if isinstance(content, list):
        kinds = {part.get("type") for part in content}
        if kinds != {"text"}:
            raise DemonstrationError(f"'{name}' has a content with {', '.join(map(str, kinds))}, but it must be text")
        content = "".join(part["text"] for part in content)
    return Turn(message["role"], content)


def _completion(value: Any) -> Any:
    if isinstance(value, list):
        if value[-1].role != "assistant":
            raise DemonstrationError(f"a completion ends with the {value[-1].role}, but it must end with the assistant")
        return value[-1].content
    return value


def _demonstration(prompt: Sequence[Turn], positive: Any, negative: Any, topic: Any) -> Demonstration:
    *history, last = prompt
    if last.role != "user":
        raise DemonstrationError(f"the prompt ends with the {last.role}, but it must end with the user")
    return Demonstration(last.content, positive, negative, tuple(history), topic)
