"""Greedy completions in batches, and evaluation mode."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sealign.errors import SettingError
from sealign.models.batching import pad_right, pad_token
from sealign.models.structure import context_length, input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    use_cache: bool = True,
) -> Tensor:
    """Return greedy completions of prompts, (b, max_new_tokens) ids with -1 from each end token on."""
    device, pad = input_device(model), pad_token(tokenizer)
    reverse = [list(reversed(prompt)) for prompt in prompts]
    ids, mask = (tensor.flip(1) for tensor in pad_right(reverse, pad, device))
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
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    stops = torch.tensor([] if ends is None else [ends] if isinstance(ends, int) else ends)
    ended = torch.isin(new, stops).cumsum(1) > 0
    new = torch.where(ended, -1, new)
    return torch.nn.functional.pad(new, (0, max_new_tokens - new.shape[1]), value=-1)


def room_for_answer(model: PreTrainedModel, length: int, what: str, remedy: str) -> int:
    """Return how many tokens the model's context still holds behind a text of some length.

    Args:
        model: the model.
        length: of the text, in tokens.
        what: what the text is, for the message.
        remedy: what helps, for the message.

    Raises:
        SettingError: none.
    """
    limit = context_length(model)
    if limit is None:
        return sys.maxsize
    if length >= limit:
        raise SettingError(
            f"{what} is {length} tokens long, but the model's context is {limit}, with its answer; {remedy}"
        )
    return limit - length
