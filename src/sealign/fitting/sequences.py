"""The token sequences that are run for a set of demonstrations, and the activations that are read from each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sealign.demonstrations.demonstration import Demonstration
from sealign.errors import DemonstrationError, ModelError
from sealign.fitting.collect_config import CollectConfig, TokenChoice
from sealign.models.structure import context_length, unwrap_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROLES = ("neutral", "positive", "negative")
"""Names of the three roles; a role is given by its index."""


@dataclass(frozen=True)
class Read:
    """One activation to read from a sequence: the mean over a range of its tokens.

    Attributes:
        role: Index in ``ROLES``.
        demonstration: Index of the demonstration.
        start: Index of the first token of the range.
        stop: Index after the last token of the range, greater than ``start``.
    """

    role: int
    demonstration: int
    start: int
    stop: int


@dataclass(frozen=True)
class TokenSequence:
    """Tokens that the model runs over, and the activations to read from them.

    Attributes:
        ids: Token ids.
        reads: Activations to read; never empty.
    """

    ids: list[int]
    reads: list[Read]


def plan_sequences(
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    config: CollectConfig,
    generated: list[list[int]] | None,
) -> list[TokenSequence]:
    """Return the sequences to run for some demonstrations.

    A neutral prompt has no sequence of its own: the positive sequence begins with it, and with causal attention its
    activations do not depend on the completion that follows.

    Args:
        tokenizer: Tokenizer of the model.
        demonstrations: Demonstrations to run.
        config: Collection settings.
        generated: Token ids of the model's completion of each prompt, with ``neutral='generated'``; else None.
    """
    prompt_format = config.prompt_format.resolve(tokenizer)
    sequences = []
    for index, item in enumerate(demonstrations):
        # One generator for each demonstration, so that its random tokens do not depend on the other demonstrations.
        texts = ":".join([*(turn.content for turn in item.history), item.prompt, item.positive, item.negative])
        generator = random.Random(f"{config.seed}:{texts}")

        prompt = prompt_format.encode_prompt(tokenizer, item.prompt, history=item.history)

        def read(
            role: int,
            ids: list[int],
            index: int = index,
            start: int = len(prompt),
            generator: random.Random = generator,
        ) -> Read:
            return Read(role, index, *_chosen_tokens(config.token, start, len(ids), generator))

        neutral = prompt if generated is None else prompt + generated[index]
        positive = prompt_format.encode(tokenizer, item.prompt, item.positive, history=item.history)
        negative = prompt_format.encode(tokenizer, item.prompt, item.negative, history=item.history)
        neutral_read = read(0, neutral)
        reads = [read(1, positive)]
        if generated is None:
            reads.append(neutral_read)
        else:
            sequences.append(TokenSequence(neutral, [neutral_read]))
        sequences.append(TokenSequence(positive, reads))
        sequences.append(TokenSequence(negative, [read(2, negative)]))
    return sequences


def _chosen_tokens(token: TokenChoice, prompt: int, length: int, generator: random.Random) -> tuple[int, int]:
    """Return start and stop of the tokens to read from a sequence whose first ``prompt`` tokens are the prompt."""
    if token == "random":
        index = generator.randrange(length)
        return index, index + 1
    if token == "mean":
        return 0, length
    # A prompt without a completion has no tokens of one; its last token is where the completion is decided.
    return (prompt if token == "completion" and length > prompt else length - 1), length


def check_context(
    model: PreTrainedModel, sequences: Sequence[TokenSequence], demonstrations: Sequence[Demonstration]
) -> None:
    """Raise an error if a sequence is longer than the model's context.

    Args:
        model: The model; wrappers are looked through.
        sequences: Sequences of the demonstrations.
        demonstrations: Demonstrations, for the message.

    Raises:
        DemonstrationError: Names the demonstration, its length and the context.
    """
    limit = context_length(model)
    longest = max(sequences, key=lambda sequence: len(sequence.ids))
    if limit is not None and len(longest.ids) > limit:
        read = longest.reads[0]
        raise DemonstrationError(
            f"the demonstration {demonstrations[read.demonstration]} ({ROLES[read.role]}) is {len(longest.ids)} tokens "
            f"long, but the model's context is {limit}; shorten it or leave it out"
        )


def check_tokens(model: PreTrainedModel, sequences: Sequence[TokenSequence]) -> None:
    """Raise an error if a sequence has a token that the model does not embed.

    Args:
        model: The model; wrappers are looked through.
        sequences: Sequences of the demonstrations.

    Raises:
        ModelError: Gives the token and the number of tokens that the model embeds.
    """
    known = unwrap_model(model).get_input_embeddings().weight.shape[0]
    largest = max(max(sequence.ids) for sequence in sequences)
    if largest >= known:
        raise ModelError(
            f"the tokenizer gives token {largest}, but the model embeds {known} tokens; use the tokenizer of the "
            "model, or resize the model's embedding"
        )
