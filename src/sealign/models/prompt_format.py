"""Prompt format: how a prompt is turned into text and tokens, by a chat template or a few-shot preamble."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from sealign.demonstrations.demonstration import Turn
from sealign.errors import ModelError, SettingError, unknown_name
from sealign.models.chat_template import chat_text, check_template_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptStyle = Literal["auto", "chat", "few_shot", "few_shot_chat", "plain"]
"""``chat``: chat template of the tokenizer; ``few_shot``: a preamble of answered questions, then ``Q: ... A:``;
``few_shot_chat``: the same text inside the chat template, as in the paper; ``plain``: the prompt alone; ``auto``:
``chat`` if the tokenizer has a template and no preamble is given, else ``few_shot``."""

DATE = "2024-07-26"
"""Date that chat templates get as today's, so that a text does not change from day to day."""

PROMPT_STYLES: tuple[str, ...] = get_args(PromptStyle)


def default_preamble() -> str:
    """Return the bundled few-shot preamble: an instruction and six answered questions.

    Example:
        >>> default_preamble().count("Q:")
        6
    """
    return (files("sealign.demonstrations") / "data" / "preamble.txt").read_text(encoding="utf-8").strip()


@dataclass(frozen=True)
class PromptFormat:
    """Format of the prompts that a model reads.

    Attributes:
        style: ``auto``, ``chat``, ``few_shot``, ``few_shot_chat`` or ``plain``; see ``PromptStyle``.
        preamble: Text before the question in the few-shot styles; the bundled preamble if None.
        chat_template_kwargs: Arguments of the chat template, such as ``{"enable_thinking": False}``; the name of one of
            several templates is ``chat_template``.
        date: Date that the chat template gets as today's, in ISO format, so that the text does not change from day to
            day.

    Raises:
        SettingError: The style is unknown, takes no preamble or has no chat template, or the date is no date.

    Example:
        >>> PromptFormat("plain").style
        'plain'
    """

    style: PromptStyle = "auto"
    preamble: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    date: str = DATE

    def __post_init__(self) -> None:
        if self.style not in PROMPT_STYLES:
            raise SettingError(unknown_name("prompt style", self.style, PROMPT_STYLES))
        if self.preamble is not None and self.style in ("chat", "plain"):
            raise SettingError(
                f"prompt style '{self.style}' takes no preamble; choose few_shot or few_shot_chat, or omit the preamble"
            )
        if self.chat_template_kwargs and self.style in ("few_shot", "plain"):
            raise SettingError(
                f"prompt style '{self.style}' uses no chat template, so that its arguments "
                f"({', '.join(self.chat_template_kwargs)}) would have no effect; leave them out, or choose chat"
            )
        try:
            datetime.fromisoformat(self.date)
        except (TypeError, ValueError):
            raise SettingError(f"date is {self.date!r}, but it must be a date such as 2024-07-26") from None

    def resolve(self, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
        """Return the format with ``auto`` replaced by a style and the preamble filled in.

        Args:
            tokenizer: Tokenizer that the prompts are encoded with.

        Raises:
            ModelError: A chat style is used with a tokenizer without a chat template.
            SettingError: The chat template does not use one of its arguments.
        """
        has_template = bool(getattr(tokenizer, "chat_template", None))
        style = self.style
        if style == "auto":
            style = "chat" if has_template and self.preamble is None else "few_shot"
        if style.endswith("chat") and not has_template:
            raise ModelError(
                f"prompt style '{style}' needs a chat template, but the tokenizer has none; use few_shot or plain"
            )
        preamble = self.preamble
        if preamble is None and style.startswith("few_shot"):
            preamble = default_preamble()
        if style.endswith("chat"):
            check_template_arguments(tokenizer, self.chat_template_kwargs)
        return dataclasses.replace(self, style=style, preamble=preamble)

    def prompt_text(self, tokenizer: PreTrainedTokenizerBase, prompt: str, *, history: Sequence[Turn] = ()) -> str:
        """Return the text that the model reads before it answers a prompt.

        Args:
            tokenizer: Tokenizer of the model.
            prompt: Prompt, without a chat template.
            history: Turns before the prompt: turns of the chat template, else text.

        Raises:
            ModelError: The tokenizer of a chat style has no chat template, or the template refuses the turns.
        """
        resolved = self.resolve(tokenizer)
        chats = resolved.style.endswith("chat")
        text = prompt
        if resolved.style.startswith("few_shot"):
            earlier = "" if chats else question_text(history)
            text = f"{resolved.preamble}\n\n{earlier}Q: {prompt}\nA:".lstrip()
        elif not chats:
            text = "".join(f"{turn.content}\n\n" for turn in history) + prompt
        if not chats:
            return text
        turns = [*history, Turn("user", text)]
        return chat_text(tokenizer, turns, arguments=self.chat_template_kwargs, date=self.date)

    def encode_prompt(
        self, tokenizer: PreTrainedTokenizerBase, prompt: str, *, history: Sequence[Turn] = ()
    ) -> list[int]:
        """Return the token ids of a formatted prompt."""
        return self._encode(tokenizer, self.prompt_text(tokenizer, prompt, history=history))

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, *, history: Sequence[Turn] = ()
    ) -> list[int]:
        """Return the token ids of a formatted prompt followed by a completion.

        The tokens of the prompt are always a prefix of the result, because a model that answers the prompt has read
        exactly these. Prompt and completion are encoded separately where the tokenizer would merge characters across
        the boundary.

        Args:
            tokenizer: Tokenizer of the model.
            prompt: Prompt, without a chat template.
            completion: Completion; a space is inserted before it where the prompt does not end in one.
            history: Turns before the prompt.
        """
        text = self.prompt_text(tokenizer, prompt, history=history)
        prefix = self._encode(tokenizer, text)
        separator = "" if text.endswith(("\n", " ")) else " "
        completion = separator + completion.strip()
        joint = self._encode(tokenizer, text + completion)
        if joint[: len(prefix)] == prefix and len(joint) > len(prefix):
            return joint
        return prefix + list(tokenizer.encode(completion, add_special_tokens=False))

    def _encode(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        # A chat template contains its own special tokens.
        special = not self.resolve(tokenizer).style.endswith("chat")
        ids = list(tokenizer.encode(text, add_special_tokens=special))
        # Some tokenizers append an end token, which a text that is to be continued must not have.
        return ids[:-1] if special and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def read_preamble(path: str | Path) -> str:
    """Return the text of a preamble file without leading and trailing whitespace.

    Raises:
        SettingError: The file does not exist, or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError as error:
        raise SettingError(f"there is no preamble file '{path}'; check the path") from error
    except UnicodeDecodeError as error:
        raise SettingError(f"preamble file '{path}' is not UTF-8 at byte {error.start}; save it as UTF-8") from error


def prompt_format_of(
    fit: Mapping[str, Any],
    style: str | None = None,
    preamble: str | Path | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> PromptFormat:
    """Return the prompt format that an edit was fitted with, unless other settings are given.

    Args:
        fit: Settings of the fit in the record of the edit.
        style: Style to use instead of the style of the fit.
        preamble: File with a preamble to use instead of the preamble of the fit.
        chat_template_kwargs: Arguments of the chat template to use instead of, or beside, those of the fit.

    Raises:
        SettingError: The style is unknown, the record is malformed, or the file cannot be read.
    """
    recorded: Any = fit.get("prompt_format", {})
    if not isinstance(recorded, Mapping):
        raise SettingError(
            f"the prompt format of the edit is {recorded!r}, but it must be an object; fit the edit again"
        )
    found = PromptFormat(**recorded)
    if style is not None and style != found.style:  # another style does not take over what belongs to the first
        found = PromptFormat(style, date=found.date)  # type: ignore[arg-type]
    if preamble is not None:
        found = dataclasses.replace(found, preamble=read_preamble(preamble))
    arguments = {**found.chat_template_kwargs, **(chat_template_kwargs or {})}
    return dataclasses.replace(found, chat_template_kwargs=arguments)


def question_text(turns: Iterable[Turn]) -> str:
    r"""Return turns as questions and answers, to be followed by another question.

    Example:
        >>> question_text([Turn("system", "Be brief."), Turn("user", "What is 1?"), Turn("assistant", "1.")])
        'Be brief.\n\nQ: What is 1?\nA: 1.\n\n'
    """
    marks = {"system": "", "user": "Q: ", "assistant": "A: "}
    lines = [marks[role] + content.strip() + ("\n" if role == "user" else "\n\n") for role, content in turns]
    return "".join(lines)
