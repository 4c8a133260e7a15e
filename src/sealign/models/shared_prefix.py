"""Tokens that many sequences begin with, run through a model once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

SHORTEST = 8
"""Prefixes shorter than this are not worth a run of their own."""


def common_prefix(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Return the longest prefix of all sequences that leaves each at least one token.

    Example:
        >>> common_prefix([[1, 2, 3], [1, 2, 4, 5], [1, 2]])
        [1]
    """
    if not sequences:
        return []
    first, last = min(map(tuple, sequences)), max(map(tuple, sequences))
    limit = min(len(sequence) for sequence in sequences) - 1
    length = 0
    while length < limit and first[length] == last[length]:
        length += 1
    return list(first[:length])


@dataclass(frozen=True)
class Prefix:
    """A prefix that has been run through a model, ready to be continued by batches.

    Attributes:
        ids: the tokens of the prefix; may be empty.
        cache: its keys and values for a batch of one, or None for an empty prefix.
    """

    ids: list[int]
    cache: Any

    @classmethod
    def run(cls, runner: nn.Module, ids: Sequence[int], device: torch.device, **kwargs: Any) -> Prefix:
        """Run a prefix once.

        Args:
            runner: a model or its decoder.
            ids: tokens; none are run if there are fewer than ``SHORTEST``.
            device: where the tokens go.
            **kwargs: passed to the runner.
        """
        if len(ids) < SHORTEST:
            return cls([], None)
        output = runner(input_ids=torch.tensor([list(ids)], device=device), use_cache=True, **kwargs)
        cache = getattr(output, "past_key_values", None)
        return cls(list(ids), cache) if hasattr(cache, "batch_repeat_interleave") else cls([], None)

    def continue_batch(
        self, runner: nn.Module, ids: Int[Tensor, "b t"], mask: Int[Tensor, "b t"], **kwargs: Any
    ) -> Any:
        """Run a right-padded batch of continuations of the prefix, and return the model's output.

        Padding is on the right and the mask covers prefix and batch, so that each row sees what it would
        have seen in a sequence of its own.
        """
        if self.cache is None:
            return runner(input_ids=ids, attention_mask=mask, **({"use_cache": False} | kwargs))
        rows, length = ids.shape[0], len(self.ids)
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        past = torch.ones(rows, length, dtype=mask.dtype, device=mask.device)
        return runner(
            input_ids=ids,
            attention_mask=torch.cat([past, mask], dim=1),
            past_key_values=cache,
            **({"use_cache": True} | kwargs),
        )


def share_beginning(
    model: nn.Module, ids: Int[Tensor, "b t"], mask: Int[Tensor, "b t"]
) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"], Any] | None:
    """Run once what all rows of a batch begin with, and return ids, mask and cache for ``generate``, or None.

    The padding of a row goes behind the shared beginning, where the mask hides it as before it. None where the rows
    share less than ``SHORTEST`` tokens, or where the model's cache cannot be repeated.

    Args:
        model: with its head, as it will generate.
        ids: padded on the left.
        mask: 0 where it is padding.
    """
    rows = [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]
    if len(rows) < 2:
        return None
    prefix = Prefix.run(model, common_prefix(rows), ids.device, logits_to_keep=1)
    if prefix.cache is None:
        return None
    prefix.cache.batch_repeat_interleave(len(rows))
    length = len(prefix.ids)
    shared, seen = ids.clone(), mask.clone()
    for number, row in enumerate(rows):
        padding = ids.shape[1] - len(row)
        shared[number, :length] = ids.new_tensor(prefix.ids)
        shared[number, length : length + padding] = ids[number, :padding]
        seen[number, :length] = 1
        seen[number, length : length + padding] = 0
    return shared, seen, prefix.cache
