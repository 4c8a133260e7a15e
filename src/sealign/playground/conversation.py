"""A conversation with a model over several turns."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from sealign.demonstrations.demonstration import Turn
from sealign.models.eval_mode import eval_mode
from sealign.models.generation import generate_ids, room_for_answer
from sealign.models.prompt_format import PromptFormat

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
        prompt_format: PromptFormat = PromptFormat(),
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._use_cache = use_cache
        if getattr(tokenizer, "chat_template", None):
            self._format = dataclasses.replace(prompt_format, style="chat", preamble=None).resolve(tokenizer)
        else:
            self._format = PromptFormat("few_shot", "")
        self._start = [] if system is None else [Turn("system", system)]
        self._turns = list(self._start)

    def say(self, text: str) -> str:
        """Add a turn of the user and the answer of the model to the conversation, and return the answer.

        Args:
            text: Message of the user.
        """
        turns = [*self._turns, Turn("user", text)]
        answer = self._answer(turns)
        self._turns = [*turns, Turn("assistant", answer)]
        return answer

    def answer_once(self, text: str) -> str:
        """Return the answer to a text without adding a turn.

        Args:
            text: Message of the user.
        """
        return self._answer([*self._turns, Turn("user", text)])

    def reset(self) -> None:
        """Remove all turns but the system message."""
        self._turns = list(self._start)

    @torch.no_grad()
    def _answer(self, turns: list[Turn]) -> str:
        *history, last = turns
        ids = self._format.encode_prompt(self._tokenizer, last.content, history=history)
        room = room_for_answer(self._model, len(ids), "the conversation", "reset it (/reset) or say less")
        length = min(self._max_new_tokens, room)
        with eval_mode(self._model):
            generated = generate_ids(self._model, self._tokenizer, [ids], length, use_cache=self._use_cache)
        new = generated[0].tolist()
        return str(self._tokenizer.decode([token for token in new if token >= 0], skip_special_tokens=True)).strip()
