"""Prompts to answer, from a file or for a bundled behaviour."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sealign.demonstrations.bundled import BUNDLED_PREFIX, bundled_behaviours, bundled_path
from sealign.demonstrations.demonstration import Demonstration, Turn, check_history, check_text, prompt_hash
from sealign.demonstrations.preference_rows import message_turns
from sealign.demonstrations.row_files import FORMATS, Row, read_rows
from sealign.errors import DemonstrationError


@dataclass(frozen=True)
class Prompt:
    """A prompt without an answer.

    Attributes:
        text: Text of the user, without a chat template.
        history: Turns before it, such as a system message; empty for most prompts.

    Raises:
        DemonstrationError: A text is empty or contains a lone surrogate, or a turn has an unknown role.

    Example:
        >>> Prompt("What do bees make?").text
        'What do bees make?'
    """

    text: str
    history: tuple[Turn, ...] = ()

    def __post_init__(self) -> None:
        check_text("prompt", self.text)
        check_history(self.history)

    @property
    def hash(self) -> str:
        """``prompt_hash`` of text and history."""
        return prompt_hash(self.text, self.history)


def prompts_of(demonstrations: Iterable[Demonstration], limit: int | None = None) -> list[Prompt]:
    """Return the prompts of demonstrations, each once, in their order.

    Args:
        demonstrations: Demonstrations.
        limit: Maximum number of prompts; None returns all.

    Example:
        >>> prompts_of([Demonstration("a", "b", "c"), Demonstration("a", "d", "c")])
        [Prompt(text='a', history=())]
    """
    found = dict.fromkeys(Prompt(item.prompt, item.history) for item in demonstrations)
    return list(found)[:limit]


def load_prompts(source: str | Path) -> list[Prompt]:
    """Load prompts from a file, or those that are bundled for showing a behaviour.

    The prompts of a bundled behaviour are open, and on topics that occur nowhere in its demonstrations.

    Args:
        source: ``bundled:NAME`` (see ``bundled_behaviours``); a file of rows (see ``read_rows``), such as ``.jsonl``,
            with the key ``prompt``, a text or messages, or ``messages``; or any other file: text in UTF-8 with one
            prompt per line.

    Raises:
        DemonstrationError: The name is unknown, the file is missing, empty or not UTF-8, or a row is malformed.

    Example:
        >>> load_prompts("bundled:positivity")[0].text
        'How is your new haircut?'
    """
    text = str(source)
    path = bundled_path(text, ".txt") if text.startswith(BUNDLED_PREFIX) else Path(source)
    if not path.is_file():
        raise DemonstrationError(f"there is no file '{path}'; give a file of prompts or bundled:NAME")
    if path.suffix.lower() in FORMATS:
        return [_placed(place, row) for place, row in read_rows(path)]
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DemonstrationError(f"'{path}' is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    prompts = [Prompt(line.strip()) for line in lines if line.strip()]
    if not prompts:
        raise DemonstrationError(f"'{path}' is empty; write one prompt per line")
    return prompts


def bundled_prompts() -> dict[str, list[str]]:
    """Return the texts of the prompts of each bundled behaviour, by its name.

    Example:
        >>> bundled_prompts()["positivity"][0]
        'How is your new haircut?'
    """
    return {name: [prompt.text for prompt in load_prompts(f"bundled:{name}")] for name in bundled_behaviours()}


def _placed(place: str, row: Row) -> Prompt:
    try:
        return _parse(row)
    except DemonstrationError as error:
        raise DemonstrationError(f"{place}: {error}") from error


def _parse(row: Mapping[str, Any]) -> Prompt:
    """Return the prompt of a row; of a conversation, an answer of the assistant at its end is left out."""
    name = next((name for name in ("prompt", "messages") if name in row), None)
    if name is None:
        found = ", ".join(map(str, row)) or "none"
        raise DemonstrationError(f"no key 'prompt' or 'messages', found {found}; add or rename it")
    if not isinstance(row[name], list):
        return Prompt(row[name])
    turns = message_turns(name, row[name])
    if turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    if not turns or turns[-1].role != "user":
        raise DemonstrationError(f"'{name}' has no message of the user at its end; add one")
    return Prompt(turns[-1].content, tuple(turns[:-1]))
