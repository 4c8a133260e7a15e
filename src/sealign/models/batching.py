"""Pad sequences of unequal lengths into one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sealign.errors import ModelError


def pad_right(
    sequences: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """Return ids and mask of sequences padded on the right.

    Example:
        >>> pad_right([[5], [6, 7]], 0, torch.device("cpu"))[0].tolist()
        [[5, 0], [6, 7]]
    """
    width = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids.to(device), mask.to(device)


def pad_token(tokenizer: Any) -> int:
    """Return the id to pad with; any will do, since padding is masked.

    Raises:
        ModelError: the tokenizer has neither a padding nor an end token, nor any other.
    """
    for name in ("pad_token_id", "eos_token_id", "unk_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return value
    if len(tokenizer) > 0:
        return 0
    raise ModelError("the tokenizer has no tokens; load the one that belongs to the model")
