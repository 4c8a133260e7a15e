"""Greedy completions in batches, and evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sealign.prefix import input_device, pad_right, pad_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, so that dropout adds no noise, and restore each module's mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


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
