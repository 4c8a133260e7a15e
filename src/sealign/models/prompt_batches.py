"""Which prompts a model answers together as it answers each alone, proved by numbers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sealign.errors import SealignWarning
from sealign.models.batching import pad_left
from sealign.models.rounding import tolerance
from sealign.models.sampling import GREEDY
from sealign.models.structure import input_device, unwrap_model

Batching = Literal["padded", "equal", "alone"]
"""Prompts that may run together: all, padded on the left; those of equal length; none."""

_ROWS = tuple(tuple(10 + (step * index) % 23 for index in range(length)) for step, length in ((5, 2), (7, 13), (9, 13)))
_proved: WeakKeyDictionary[Any, dict[torch.dtype, Batching]] = WeakKeyDictionary()


def prompt_groups(model: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the indices of prompts that may run together, group by group.

    Args:
        model: The model, with any edits that are attached to it; in evaluation mode.
        prompts: Token ids of the prompts.
    """
    if len(prompts) < 2:
        return [list(range(len(prompts)))]
    allowed = allowed_batching(model)
    if allowed == "padded":
        return [list(range(len(prompts)))]
    groups: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(len(prompt) if allowed == "equal" else index, []).append(index)
    return list(groups.values())


@torch.no_grad()
def allowed_batching(model: Any) -> Batching:
    """Return which prompts a model answers together as it answers each alone; compared once for each model and type.

    Recurrent models that ignore the mask run the padding too; a mask whose lowest number becomes infinite, as in
    float64 where the softmax is computed in float32, gives NaN; and RWKV mixes up the states of a batch. A warning says
    so.

    Args:
        model: The model, with any edits that are attached to it; in evaluation mode.
    """
    base = unwrap_model(model)
    known = _proved.setdefault(base, {})
    if base.dtype not in known:
        known[base.dtype] = _compare(base)
    return known[base.dtype]


def _compare(base: Any) -> Batching:
    name, limit = f"{type(base).__name__} in {str(base.dtype)[6:]}", tolerance(base.dtype)
    short, first, second = _ROWS
    if not (gap := _gap(base, [first, second])) <= limit:
        _warn(f"a batch {_describe(gap)} of {name}; prompts are answered one at a time")
        return "alone"
    if not (gap := _gap(base, [short, first])) <= limit:
        _warn(f"padding before a prompt {_describe(gap)} of {name}; only prompts of equal length are answered together")
        return "equal"
    return "padded"


def _warn(sentence: str) -> None:
    warnings.warn(f"{sentence}, which is slower", SealignWarning, stacklevel=4)


def _describe(gap: float) -> str:
    return "gives NaN as next tokens" if gap != gap else f"changes the next tokens by {gap:.2g} nats"


def _gap(base: Any, rows: Sequence[Sequence[int]]) -> float:
    """Return the mean difference of log p over the vocabulary between a batch and each of its rows alone."""
    alone = torch.cat([_next_tokens(base, [row]) for row in rows])
    return float((_next_tokens(base, rows) - alone).abs().mean())


def _next_tokens(base: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the log-probabilities of two tokens after each row, (b, 2, vocabulary), with the cache that is used."""
    ids, mask = pad_left(rows, 0, input_device(base))
    # That of the class, because a method such as Best-of-N replaces that of the object.
    found = type(base).generate(
        base,
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=2,
        min_new_tokens=2,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **GREEDY,
    )
    return torch.log_softmax(torch.stack(found.logits, dim=1).float(), dim=-1)
