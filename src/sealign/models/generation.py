"""Greedy completions in batches."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sealign.errors import SettingError
from sealign.models.batching import pad_left, pad_token
from sealign.models.structure import context_length, input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    use_cache: bool = True,
    keep_end: bool = False,
) -> Tensor:
    """Return greedy completions of prompts as (b, max_new_tokens) token ids, -1 from the first end token on.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer, for the padding token.
        prompts: Token ids of the prompts.
        max_new_tokens: Largest number of tokens to generate. Must be at least 1.
        use_cache: Whether to use the cache of keys and values; without it every step runs the whole sequences.
        keep_end: Whether to keep the first end token.
    """
    device, pad = input_device(model), pad_token(tokenizer, model)
    ids, mask = pad_left(prompts, pad, device)
    output: Any = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=pad,
        use_cache=use_cache,
    )
    new = output[:, ids.shape[1] :].cpu()
    ends_here = torch.isin(new, torch.tensor(end_tokens(model))).long()
    ended = ends_here.cumsum(1) - (ends_here if keep_end else 0) > 0
    new = torch.where(ended, -1, new)
    return torch.nn.functional.pad(new, (0, max_new_tokens - new.shape[1]), value=-1)


def end_tokens(model: PreTrainedModel) -> list[int]:
    """Return the token ids that end a completion; an empty list if there are none.

    Args:
        model: A model that generates.
    """
    ends: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def room_for_answer(model: PreTrainedModel, length: int, what: str, remedy: str) -> int:
    """Return the number of tokens that fit into the context of the model after a text.

    Args:
        model: The model; a context without a known limit gives ``sys.maxsize``.
        length: Length of the text in tokens.
        what: Description of the text, for the message.
        remedy: Advice to the user, for the message.

    Raises:
        SettingError: The text fills the context.
    """
    limit = context_length(model)
    if limit is None:
        return sys.maxsize
    if length >= limit:
        raise SettingError(
            f"{what} is {length} tokens long, but the context of the model is {limit} tokens including the answer; "
            f"{remedy}"
        )
    return limit - length
