"""Which token sequences are run over demonstrations, and what is read from each."""

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


@dataclass(frozen=True)
class Read:
    """One activation to take from a sequence: over its first ``length`` tokens."""

    role: int
    demonstration: int
    length: int
    random_index: int


@dataclass(frozen=True)
class TokenSequence:
    """Token ids that are run together, and the activations to take from them."""

    ids: list[int]
    reads: list[Read]


def plan_sequences(
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    config: CollectConfig,
    generated: list[list[int]] | None,
) -> list[TokenSequence]:
    """Lay out which sequences are run and what is read from each."""
    prompt_format = config.prompt_format.resolve(tokenizer)
    sequences = []
    for index, item in enumerate(demonstrations):
        # One generator a demonstration, so that the choice does not depend on which others are run beside it.
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
            # Causal attention: the prompt's activations are the same with a completion behind it.
            reads.append(neutral_read)
        else:
            sequences.append(TokenSequence(neutral, [neutral_read]))
        sequences.append(TokenSequence(positive, reads))
        sequences.append(TokenSequence(negative, [read(2, len(negative))]))
    return sequences


def check_context(
    model: PreTrainedModel, sequences: Sequence[TokenSequence], demonstrations: Sequence[Demonstration]
) -> None:
    """Raise where a sequence of some demonstrations is longer than the model's context.

    Raises:
        DemonstrationError: names the demonstration, its length and the context.
    """
    limit = context_length(model)
    longest = max(sequences, key=lambda sequence: len(sequence.ids))
    if limit is not None and len(longest.ids) > limit:
        read = longest.reads[0]
        raise DemonstrationError(
            f"the demonstration {demonstrations[read.demonstration]} ({ROLES[read.role]}) is {len(longest.ids)} tokens "
            f"long, but the model's context is {limit}; shorten it or leave it out"
        )
