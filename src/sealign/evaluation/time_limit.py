"""Time limit of a search: layers in an order that is useful wherever it stops, and estimates from measured speed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from sealign.errors import SettingError
from sealign.models.batching import pad_right, pad_token
from sealign.models.eval_mode import eval_mode
from sealign.models.passages import Passage
from sealign.models.structure import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MARGIN = 1.25
"""Factor of estimates, which leave out what is small."""

COARSE = 4
"""The first round has one in so many layers."""


@dataclass(frozen=True)
class TimeLimit:
    """The time that a search may take.

    Attributes:
        minutes: Largest duration in minutes; None for no limit.
        started: Time at which the search started, on the clock of ``time.perf_counter``.
    """

    minutes: float | None
    started: float = field(default_factory=lambda: time.perf_counter())

    @property
    def left(self) -> float:
        """Seconds that are left; infinity without a limit."""
        return float("inf") if self.minutes is None else 60 * self.minutes - (time.perf_counter() - self.started)

    def check(self, needed: float) -> None:
        """Raise an error if the smallest search does not fit.

        Args:
            needed: Seconds that it takes from now on.

        Raises:
            SettingError: Gives the time that it takes with what has been done.
        """
        if self.minutes is not None and needed > self.left:
            least = self.minutes + (needed - self.left) / 60
            raise SettingError(
                f"max_minutes is {self.minutes:g}, but the smallest search takes about {least:.2g} minutes here; allow "
                "more, or give fewer demonstrations, layers or finalists"
            )


def layer_rounds(layers: Sequence[int]) -> list[list[int]]:
    """Return layers in rounds: one in four, those in the middle between them, and the others.

    Args:
        layers: Layers to search, in ascending order.

    Example:
        >>> layer_rounds(range(9))
        [[2, 6], [0, 4, 8], [1, 3, 5, 7]]
    """
    rounds = [layers[COARSE // 2 :: COARSE], layers[::COARSE], layers[1::2]]
    return [list(own) for own in rounds if own]


def seconds_per_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, passages: Sequence[Passage]) -> float:
    """Return how long a forward pass takes for one token, by one batch of passages.

    Args:
        model: The model.
        tokenizer: Tokenizer of the model.
        passages: At least 1 passage.
    """
    batch = passages[:8]
    ids, mask = pad_right([passage.ids for passage in batch], pad_token(tokenizer, model), input_device(model))
    forward: Any = model
    durations = []
    with torch.no_grad(), eval_mode(model):
        for _ in range(2):  # the first pass of a process is slow
            started = time.perf_counter()
            forward(input_ids=ids, attention_mask=mask, use_cache=False)
            durations.append(time.perf_counter() - started)
    return min(durations) / ids.numel()


def count_tokens(passages: Sequence[Passage]) -> int:
    """Return the number of tokens of passages, scored or not."""
    return sum(len(passage.ids) for passage in passages)
