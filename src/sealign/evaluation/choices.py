"""Continuations to be scored, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class ChoiceRequest:
    """A context and its continuations to be scored.

    Attributes:
        context: Token ids of the context, at least 1.
        continuations: Token ids of each continuation, at least 1 each.

    Example:
        >>> ChoiceRequest((1, 2), ((3,), (4, 5))).length
        3
    """

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Number of tokens to run; the last one of each continuation is only predicted."""
        return len(self.context) + sum(len(tokens) - 1 for tokens in self.continuations)

    @property
    def longest(self) -> int:
        """Number of tokens of the context and its longest continuation."""
        return len(self.context) + max(len(tokens) for tokens in self.continuations)


class ChoiceScore(NamedTuple):
    """Score of one continuation.

    Attributes:
        log_probability: log p(continuation | context) in nats, summed over tokens.
        greedy: Whether greedy decoding would give the continuation.
    """

    log_probability: float
    greedy: bool


OnScored = Callable[[Sequence[tuple[int, list[ChoiceScore]]]], None]
"""Function that is called with (index of the request, its scores) of the requests that are finished."""


def choice_scores(
    logits: Float[Tensor, "positions vocabulary"], predicting: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[ChoiceScore]:
    """Return the scores of continuations from the logits that predict their tokens.

    Args:
        logits: Logits at the positions that predict a token.
        predicting: For each token of each continuation in turn, the row of ``logits`` that predicts it.
        continuations: Token ids of each continuation.
    """
    logs = torch.log_softmax(logits.float(), dim=-1)
    targets = torch.tensor([token for tokens in continuations for token in tokens])
    chosen = logs[predicting, targets].double().cpu()
    greedy = logs.argmax(-1)[predicting].cpu() == targets
    lengths = [len(tokens) for tokens in continuations]
    parts = zip(torch.split(chosen, lengths), torch.split(greedy, lengths), strict=True)
    return [ChoiceScore(float(values.sum()), bool(hits.all())) for values, hits in parts]
