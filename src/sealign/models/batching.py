"""Padding of token sequences of different lengths into a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sealign.models.structure import unwrap_model


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


def pad_token(tokenizer: Any, model: nn.Module) -> int:
    """Return a token id to pad with; any id that the model embeds will do, because padding is masked.

    Args:
        tokenizer: A tokenizer of transformers. Its own pad token may have been added after the model was trained.
        model: The model that will run the batch.
    """
    known = unwrap_model(model).get_input_embeddings().weight.shape[0]
    for name in ("pad_token_id", "eos_token_id", "unk_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int) and 0 <= value < known:
            return value
    return 0
