"""Padding of token sequences of different lengths into a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sealign.errors import ModelError


def pad_right(
    sequences: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """Return token ids and attention mask of sequences padded on the right.

    Args:
        sequences: Token ids of at least one sequence.
        pad: Token id to pad with.
        device: Device of the result.

    Example:
        >>> pad_right([[5], [6, 7]], 0, torch.device("cpu"))[0].tolist()
        [[5, 0], [6, 7]]
    """
    return _pad(sequences, pad, device, "right")


def pad_left(
    sequences: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """Return token ids and attention mask of sequences padded on the left, as generation needs them.

    Args:
        sequences: Token ids of at least one sequence.
        pad: Token id to pad with.
        device: Device of the result.

    Example:
        >>> pad_left([[5], [6, 7]], 0, torch.device("cpu"))[1].tolist()
        [[0, 1], [1, 1]]
    """
    return _pad(sequences, pad, device, "left")


def _pad(sequences: Sequence[Sequence[int]], pad: int, device: torch.device, side: str) -> tuple[Tensor, Tensor]:
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)


def pad_token(tokenizer: Any) -> int:
    """Return a token id to pad with; any valid id will do, because padding is masked.

    Args:
        tokenizer: A tokenizer of transformers.

    Raises:
        ModelError: The tokenizer has no tokens.
    """
    for name in ("pad_token_id", "eos_token_id", "unk_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return value
    if len(tokenizer) > 0:
        return 0
    raise ModelError("the tokenizer has no tokens; load the one that belongs to the model")
