"""Shared prefixes: tokens that many sequences begin with, run through a model once."""

from __future__ import annotations

import copy
import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

SHORTEST = 8
"""Smallest number of tokens for which a separate run of the prefix saves time."""


def common_prefix(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Return the longest common prefix that leaves at least one token of each sequence.

    Args:
        sequences: Token ids; none gives an empty prefix.

    Example:
        >>> common_prefix([[1, 2, 3], [1, 2, 4, 5], [1, 2]])
        [1]
    """
    beginnings = [list(sequence[:-1]) for sequence in sequences]
    return list(os.path.commonprefix(beginnings))  # noqa: RUF071 the elements are numbers, not characters of a path


@dataclass(frozen=True)
class Prefix:
    """A prefix that has been run through a model, to be continued by batches.

    Attributes:
        ids: Token ids of the prefix; may be empty.
        cache: Cache of keys and values for a batch of one sequence; None for an empty prefix.
    """

    ids: list[int]
    cache: Any

    @classmethod
    def run(cls, runner: nn.Module, ids: Sequence[int], device: torch.device, **kwargs: Any) -> Prefix:
        """Run a prefix through a model.

        The result is an empty prefix if there are fewer than ``SHORTEST`` tokens, or if the cache of the model cannot
        be repeated for the rows of a batch.

        Args:
            runner: A model or its decoder.
            ids: Token ids of the prefix.
            device: Device of the token ids.
            **kwargs: Further arguments of the runner.
        """
        if len(ids) < SHORTEST:
            return cls([], None)
        output = runner(input_ids=torch.tensor([list(ids)], device=device), use_cache=True, **kwargs)
        cache = getattr(output, "past_key_values", None)
        return cls(list(ids), cache) if hasattr(cache, "batch_repeat_interleave") else cls([], None)

    def continue_batch(
        self, runner: nn.Module, ids: Int[Tensor, "b t"], mask: Int[Tensor, "b t"], **kwargs: Any
    ) -> Any:
        """Run a batch of continuations of the prefix and return the output of the model for the continuations.

        Padding is on the right, and the mask covers prefix and batch, so that each row gets the same result as a
        sequence of its own.

        Args:
            runner: The model or decoder that the prefix was run through.
            ids: Token ids of the continuations, padded on the right.
            mask: 1 for tokens, 0 for padding.
            **kwargs: Further arguments of the runner.
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


def share_prefix(
    model: nn.Module, ids: Int[Tensor, "b t"], mask: Int[Tensor, "b t"]
) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"], Any] | None:
    """Run the common prefix of all rows of a batch once; return token ids, mask and cache for ``generate``.

    The padding of each row is moved behind the common prefix, where the mask still hides it. Returns None if the rows
    have fewer than ``SHORTEST`` tokens in common, or if the cache of the model cannot be repeated.

    Args:
        model: The model, with its language-model head, that will generate.
        ids: Token ids, padded on the left.
        mask: 1 for tokens, 0 for padding.
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
