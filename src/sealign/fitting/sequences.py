"""The token sequences that are run for a set of demonstrations, and the activations that are read from each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sealign.demonstrations.demonstration import Demonstration
from sealign.errors import DemonstrationError
from sealign.fitting.collect_config import CollectConfig
from sealign.models.structure import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROLES = ("neutral", "positive", "negative")
"""Names of the three roles; a role is given by its index."""


@dataclass(frozen=True)
class Read:
    """One activation to read from a sequence.

    Attributes:
        role: Index in ``ROLES``.
        demonstration: Index of the demonstration.
        length: Number of tokens, from the beginning of the sequence, that belong to this role.
        random_index: Index of the token that is read with ``token='random'``, less than ``length``.
    """

    role: int
    demonstration: int
    length: int
    random_index: int


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
        generator = random.Random(f"{config.seed}:{item.prompt}:{item.positive}:{item.negative}")

        def read(role: int, length: int, index: int = index, generator: random.Random = generator) -> Read:
            return Read(role, index, length, generator.randrange(length))

        prompt = prompt_format.encode_prompt(tokenizer, item.prompt)
        neutral = prompt if generated is None else prompt + generated[index]
        positive = prompt_format.encode(tokenizer, item.prompt, item.positive)
        negative = prompt_format.encode(tokenizer, item.prompt, item.negative)
        neutral_read = read(0, len(neutral))
        reads = [read(1, len(positive))]
        if generated is None:
            reads.append(neutral_read)
        else:
            sequences.append(TokenSequence(neutral, [neutral_read]))
        sequences.append(TokenSequence(positive, reads))
        sequences.append(TokenSequence(negative, [read(2, len(negative))]))
    return sequences


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
