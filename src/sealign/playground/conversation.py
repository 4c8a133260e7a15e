"""A conversation with a model over several turns."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from sealign.demonstrations.demonstration import Turn
from sealign.models.eval_mode import eval_mode
from sealign.models.generation import end_tokens, generate_ids, room_for_answer
from sealign.models.prompt_format import PromptFormat
from sealign.models.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Conversation:
    """A conversation between a user and a model.

    The turns are written in the chat template of the tokenizer, or as questions and answers if it has none.

    Args:
        model: The model, with any edits that are attached to it.
        tokenizer: Tokenizer of the model.
        system: System message before the first turn.
        max_new_tokens: Maximum number of tokens of an answer.
        use_cache: Whether to use the cache of keys and values. Must be False for an edit that is not causal.
        sampling: How the tokens of answers are drawn; greedy decoding if None.
        prompt_format: Format whose chat template arguments and date are used; its style and preamble are not.

    Raises:
        ModelError: The chat template refuses the turns; some refuse a system message.
        SettingError: The conversation is longer than the context of the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        max_new_tokens: int = 128,
        use_cache: bool = True,
        sampling: Sampling | None = None,
        prompt_format: PromptFormat = PromptFormat(),
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._use_cache = use_cache
        self._sampling = sampling
        self._format = conversation_format(tokenizer, prompt_format, prompt_format.chat_template_kwargs)
        self._start = [] if system is None else [Turn("system", system)]
        self._turns = list(self._start)

    def say(self, text: str, on_text: Callable[[str], None] | None = None) -> str:
        """Add a turn of the user and the answer of the model to the conversation, and return the answer.

        Args:
            text: Message of the user.
            on_text: Function that is called with each new piece of the answer as soon as it is there; the pieces
                together are the answer.
        """
        turns = [*self._turns, Turn("user", text)]
        answer = self._answer(turns, on_text)
        self._turns = [*turns, Turn("assistant", answer)]
        return answer

    def answer_once(self, text: str, on_text: Callable[[str], None] | None = None) -> str:
        """Return the answer to a text without adding a turn.

        Args:
            text, on_text: As for ``say``.
        """
        return self._answer([*self._turns, Turn("user", text)], on_text)

    def branch(self) -> Conversation:
        """Return another conversation with the same turns so far."""
        branch = copy.copy(self)
        branch._turns = list(self._turns)
        return branch

    def reset(self) -> None:
        """Remove all turns but the system message."""
        self._turns = list(self._start)

    @torch.no_grad()
    def _answer(self, turns: list[Turn], on_text: Callable[[str], None] | None) -> str:
        *history, last = turns
        ids = self._format.encode_prompt(self._tokenizer, last.content, history=history)
        room = room_for_answer(self._model, len(ids), "the conversation", "reset it (/reset) or say less")
        length = min(self._max_new_tokens, room)
        stream = None if on_text is None else _TextStream(self._decode, end_tokens(self._model), on_text)
        with eval_mode(self._model):
            generated = generate_ids(
                self._model,
                self._tokenizer,
                [ids],
                length,
                use_cache=self._use_cache,
                sampling=self._sampling,
                on_token=stream,
            )
        answer = self._decode([token for token in generated[0].tolist() if token >= 0])
        if stream is not None:
            stream.finish(answer)
        return answer

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def conversation_format(
    tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat, arguments: Mapping[str, Any]
) -> PromptFormat:
    """Return how the turns of a conversation are written: in the chat template, or as questions and answers.

    Args:
        tokenizer: Tokenizer of the model.
        prompt_format: Format whose date is used.
        arguments: Arguments of the chat template; not used if the tokenizer has none.

    Raises:
        SettingError: The chat template does not use one of its arguments.
    """
    if not getattr(tokenizer, "chat_template", None):
        return PromptFormat("few_shot", "")
    written = dataclasses.replace(prompt_format, style="chat", preamble=None, chat_template_kwargs=arguments)
    return written.resolve(tokenizer)


class _TextStream:
    """The text of an answer, passed on in pieces as its tokens come.

    A piece is passed on when it cannot change any more: bytes of a character that is not complete are kept back.
    """

    def __init__(self, decode: Callable[[list[int]], str], ends: list[int], on_text: Callable[[str], None]) -> None:
        self._decode, self._ends, self._on_text = decode, ends, on_text
        self._tokens: list[int] = []
        self._shown = ""
        self._ended = False

    def __call__(self, token: int) -> None:
        """Receive the next token."""
        self._ended = self._ended or token in self._ends
        if not self._ended:
            self._tokens.append(token)
            self._show(self._decode(self._tokens).rstrip("\N{REPLACEMENT CHARACTER}").rstrip())

    def finish(self, answer: str) -> None:
        """Pass on what is left of the answer, or all of it if the tokenizer has changed what was passed on before."""
        if not answer.startswith(self._shown):
            self._on_text("\n")
            self._shown = ""
        self._show(answer)

    def _show(self, text: str) -> None:
        if len(text) > len(self._shown) and text.startswith(self._shown):
            self._on_text(text[len(self._shown) :])
            self._shown = text
