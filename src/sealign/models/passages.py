"""Passages: texts of which some tokens are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sealign.demonstrations.demonstration import Demonstration
from sealign.models.generation import generate_ids
from sealign.models.prompt_format import PromptFormat
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OWN_ANSWER_TOKENS = 32
"""Maximum number of tokens of a model's own answer."""


@dataclass(frozen=True)
class Passage:
    """A text of which the tokens from a position on are scored, given those before them.

    Attributes:
        ids: Token ids.
        start: Index of the first scored token, in [1, len(ids) - 1].

    Example:
        >>> Passage((5, 8, 9), 1).count
        2
    """

    ids: tuple[int, ...]
    start: int

    @property
    def count(self) -> int:
        """Number of scored tokens."""
        return len(self.ids) - self.start


def text_passages(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, length: int | None = None
) -> list[Passage]:
    """Return texts as passages in which every token but the first is scored.

    Args:
        tokenizer: Tokenizer of the model.
        texts: Texts; those of fewer than 2 tokens are left out.
        length: Number of tokens at which a text is split into several passages; None to keep each whole.
    """
    passages = []
    for text in texts:
        ids = tuple(tokenizer.encode(text))
        step = length or max(1, len(ids))
        parts = [ids[first : first + step] for first in range(0, len(ids), step)]
        passages += [Passage(part, 1) for part in parts if len(part) > 1]
    return passages


def completion_passages(
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    *,
    prompt_format: PromptFormat = PromptFormat(),
) -> list[tuple[Passage, Passage]]:
    """Return the positive and the negative completion of each demonstration as passages, given its prompt.

    Args:
        tokenizer: Tokenizer of the model.
        demonstrations: Demonstrations.
        prompt_format: How prompts are written.
    """
    written = prompt_format.resolve(tokenizer)
    pairs = []
    for item in demonstrations:
        start = len(written.encode_prompt(tokenizer, item.prompt, history=item.history))
        positive, negative = (
            Passage(tuple(written.encode(tokenizer, item.prompt, text, history=item.history)), start)
            for text in (item.positive, item.negative)
        )
        pairs.append((positive, negative))
    return pairs


def distinct_prompts(
    tokenizer: PreTrainedTokenizerBase, demonstrations: Sequence[Demonstration], prompt_format: PromptFormat
) -> list[tuple[int, ...]]:
    """Return the token ids of the prompts of demonstrations, each prompt once, in their order.

    Args:
        tokenizer: Tokenizer of the model.
        demonstrations: Demonstrations with the prompts.
        prompt_format: How prompts are written.
    """
    written = prompt_format.resolve(tokenizer)
    encoded = (written.encode_prompt(tokenizer, item.prompt, history=item.history) for item in demonstrations)
    return list(dict.fromkeys(map(tuple, encoded)))


def answer_passages(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    *,
    prompt_format: PromptFormat = PromptFormat(),
    max_new_tokens: int = OWN_ANSWER_TOKENS,
    batch_size: int = 16,
    track: Track = no_progress,
) -> list[Passage]:
    """Return a model's own greedy answers to the prompts of demonstrations, each prompt once, without empty ones.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Tokenizer of the model.
        demonstrations: Demonstrations whose prompts are answered.
        prompt_format: How prompts are written.
        max_new_tokens: Maximum number of tokens of an answer.
        batch_size: Number of answers to generate together.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.
    """
    prompts = distinct_prompts(tokenizer, demonstrations, prompt_format)
    order = sorted(prompts, key=len, reverse=True)
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    answers: dict[tuple[int, ...], tuple[int, ...]] = {}
    for batch in track(batches, "Answering", len(batches)):
        rows = generate_ids(model, tokenizer, batch, max_new_tokens).tolist()
        answers |= {
            prompt: tuple(token for token in row if token >= 0) for prompt, row in zip(batch, rows, strict=True)
        }
    return [Passage(prompt + answers[prompt], len(prompt)) for prompt in prompts if answers[prompt]]
