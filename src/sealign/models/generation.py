"""Completions in batches, greedy or sampled."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sealign.errors import ModelError, SealignWarning, SettingError
from sealign.models.batching import pad_left, pad_token
from sealign.models.prompt_batches import prompt_groups
from sealign.models.sampling import GREEDY, Sampling
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
    sampling: Sampling | None = None,
    on_token: Callable[[int], None] | None = None,
    keep_end: bool = False,
) -> Tensor:
    """Return completions of prompts as (b, max_new_tokens) token ids, -1 from the first end token on.

    Prompts of different lengths are padded on the left. Where a model does not answer a batch as it answers each prompt
    alone, it is split; see ``allowed_batching``.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer, for the padding token.
        prompts: Token ids of the prompts.
        max_new_tokens: Largest number of tokens to generate. Must be at least 1.
        use_cache: Whether to use the cache of keys and values; without it every step runs the whole sequences.
        sampling: How tokens are drawn; greedy decoding if None.
        on_token: Function that is called with each new token of a single prompt, end tokens included.
        keep_end: Whether to keep the first end token.

    Raises:
        ModelError: Tokens cannot be drawn, because a logit is NaN; greedy decoding warns of it.
    """
    groups = prompt_groups(model, prompts)
    if len(groups) > 1:
        rows: list[Tensor] = [torch.empty(0)] * len(prompts)
        for group in groups:
            chosen = [prompts[index] for index in group]
            found = generate_ids(
                model,
                tokenizer,
                chosen,
                max_new_tokens,
                use_cache=use_cache,
                sampling=sampling,
                on_token=on_token,
                keep_end=keep_end,
            )
            for index, row in zip(group, found, strict=True):
                rows[index] = row
        return torch.stack(rows)
    device, pad = input_device(model), pad_token(tokenizer, model)
    ids, mask = pad_left(prompts, pad, device)
    settings = GREEDY if sampling is None else sampling.arguments()
    watch = _WatchNumbers(type(model).__name__, sampled=sampling is not None)
    with nullcontext() if sampling is None else sampling.seeded():
        output: Any = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            use_cache=use_cache,
            streamer=None if on_token is None else _TokenStream(on_token),
            logits_processor=[watch],
            **settings,
        )
    watch.warn()
    new = output[:, ids.shape[1] :].cpu()
    ends_here = torch.isin(new, torch.tensor(end_tokens(model))).long()
    ended = ends_here.cumsum(1) - (ends_here if keep_end else 0) > 0
    new = torch.where(ended, -1, new)
    return torch.nn.functional.pad(new, (0, max_new_tokens - new.shape[1]), value=-1)


class _WatchNumbers:
    """Logits processor of transformers that changes nothing, and notes whether a logit is NaN.

    Args:
        name: Name of the model, for the message.
        sampled: Whether tokens are drawn, which NaN makes impossible.
    """

    def __init__(self, name: str, *, sampled: bool) -> None:
        self._sampled = sampled
        self._seen: Tensor | None = None  # read at the end only, so that no step waits for it
        self._message = (
            f"{name} gives NaN as logits, so that its answers mean nothing; check the weights of the model, use a "
            "lower strength, or load it with --dtype float32"
        )

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores as they are."""
        found = scores.isnan().any()
        self._seen = found if self._seen is None else self._seen | found
        if self._sampled and bool(found):
            raise ModelError(self._message)
        return scores

    def warn(self) -> None:
        """Warn if a logit was NaN."""
        if self._seen is not None and bool(self._seen):
            warnings.warn(self._message, SealignWarning, stacklevel=3)


class _TokenStream:
    """Streamer of transformers that passes new tokens on, and not those of the prompt, which come first."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token = on_token
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """Receive the prompt, then one token at a time."""
        if not self._prompt:
            self._on_token(int(value))
        self._prompt = False

    def end(self) -> None:
        """Receive the end of the answer."""


def end_tokens(model: PreTrainedModel) -> list[int]:
    """Return the ids of the tokens that end an answer.

    Args:
        model: The model, with or without a generation configuration.
    """
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
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
