"""Shared prefixes: tokens that many sequences begin with, run through a model once."""

from __future__ import annotations

import copy
import os.path
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn

from sealign.errors import SealignError
from sealign.models.rounding import tolerance

SHORTEST = 8
"""Smallest number of tokens for which a separate run of the prefix saves time."""

_proved: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()
"""Whether a continued prefix gave what the whole sequences give, by runner and by the kind of its cache."""


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
        be repeated for the rows of a batch. Before the first prefix of a runner, two short sequences are run whole and
        as continuations of a prefix; if the outputs differ, all its prefixes are empty.

        Args:
            runner: A model or its decoder.
            ids: Token ids of the prefix.
            device: Device of the token ids.
            **kwargs: Further arguments of the runner.
        """
        if len(ids) < SHORTEST or not _can_continue(runner, ids, device, kwargs):
            return cls([], None)
        output = runner(input_ids=torch.tensor([list(ids)], device=device), use_cache=True, **kwargs)
        return cls(list(ids), output.past_key_values)

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
        cache = repeat_cache(self.cache, rows)
        past = torch.ones(rows, length, dtype=mask.dtype, device=mask.device)
        return runner(
            input_ids=ids,
            attention_mask=torch.cat([past, mask], dim=1),
            past_key_values=cache,
            **({"use_cache": True} | kwargs),
        )


@torch.no_grad()
def _can_continue(runner: nn.Module, ids: Sequence[int], device: torch.device, kwargs: dict[str, Any]) -> bool:
    """Return whether a batch that continues a prefix gives what the whole sequences give; tried once for each runner.

    The form of a cache does not decide: MiniMax's has a state of its own that is not repeated for the rows of a batch.
    """
    known, kind = _proved.setdefault(runner, {}), type(kwargs.get("past_key_values")).__name__
    if kind not in known:
        prefix, tails = list(ids[:SHORTEST]), [list(ids[:3]), list(ids[2:5])]
        try:
            known[kind] = _is_continued(runner, prefix, torch.tensor(tails, device=device), copy.deepcopy(kwargs))
        except (SealignError, torch.OutOfMemoryError):
            raise
        except Exception:  # models raise many types where they cannot continue
            known[kind] = False
    return known[kind]


def _is_continued(runner: nn.Module, prefix: list[int], tails: Int[Tensor, "2 t"], kwargs: dict[str, Any]) -> bool:
    first = tails.new_tensor([prefix])
    cache = runner(input_ids=first, **({"use_cache": True} | kwargs)).past_key_values
    repeated = repeat_cache(cache, 2)
    if repeated is None:
        return False
    plain = {name: value for name, value in kwargs.items() if name != "past_key_values"}
    whole = torch.cat([first.expand(2, -1), tails], dim=1)
    mask = torch.ones_like(whole)
    expected = runner(input_ids=whole, attention_mask=mask, use_cache=False, **plain)[0]
    found = runner(input_ids=tails, attention_mask=mask, past_key_values=repeated, use_cache=True, **plain)[0]
    last, wanted = found[:, -1].float(), expected[:, -1].float()
    return float((last - wanted).norm()) <= tolerance(expected.dtype) * float(wanted.norm())


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
    length = len(prefix.ids)
    shared, seen = ids.clone(), mask.clone()
    for number, row in enumerate(rows):
        padding = ids.shape[1] - len(row)
        shared[number, :length] = ids.new_tensor(prefix.ids)
        shared[number, length : length + padding] = ids[number, :padding]
        seen[number, :length] = 1
        seen[number, length : length + padding] = 0
    return shared, seen, repeat_cache(prefix.cache, len(rows))


def repeat_cache(cache: Any, rows: int) -> Any:
    """Return a copy of the cache of one sequence for a batch of equal rows, or None if it cannot be repeated.

    Caches of recurrent layers, such as Mamba's, cannot: they have states that transformers does not repeat.

    Args:
        cache: A cache of transformers, or whatever a model returns in its place.
        rows: Number of rows. Must be at least 2 to find out whether the cache can be repeated.
    """
    layers = getattr(cache, "layers", None)
    if not layers or not all(hasattr(layer, "batch_repeat_interleave") for layer in layers):
        return None
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(rows)
    states = [tensor for layer in repeated.layers for tensor in _tensors(vars(layer))]
    return repeated if all(tensor.shape[0] == rows for tensor in states if tensor.dim() > 1) else None


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested dictionaries and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
