"""What an edit or a method costs at inference, against the base model in the same run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sealign.methods.method import check_at_least
from sealign.methods.registry import Change, apply_change, prefix_of
from sealign.models.eval_mode import eval_mode
from sealign.models.structure import input_device, text_config, unwrap_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Cost:
    """Times of a changed model over those of the base model, as ratios within rounds.

    Attributes:
        prefill: reading a prompt: median, lowest and highest ratio; 1 is no cost.
        decode: writing an answer, token by token: likewise.
        base_milliseconds: median time a token of the base model, in prefill and in decode.
    """

    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    base_milliseconds: tuple[float, float]


@torch.no_grad()
def measure_cost(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    change: Change,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 16,
    rounds: int = 5,
) -> Cost:
    """Time the base model and the changed one in turns, and return the ratios.

    Args:
        model: the base model.
        tokenizer: its own; text that a method puts before prompts is read too.
        change: an edit or a method.
        prompt_tokens: random tokens in the prompt, at least 1.
        new_tokens: that are generated, at least 2.
        rounds: base and change in turns, at least 1, after one round to warm up.

    Raises:
        SettingError: a number is below its bound.
    """
    for name, value, bound in (
        ("prompt_tokens", prompt_tokens, 1),
        ("new_tokens", new_tokens, 2),
        ("rounds", rounds, 1),
    ):
        check_at_least(name, value, bound)
    vocabulary = text_config(unwrap_model(model)).vocab_size
    drawn = torch.randint(vocabulary, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    before = torch.tensor([tokenizer.encode(prefix_of(change))], dtype=torch.long).reshape(1, -1)
    plain, prefixed = (ids.to(input_device(model)) for ids in (drawn, torch.cat([before, drawn], dim=1)))
    times: list[list[float]] = []
    with eval_mode(model), apply_change(model, change) as handle:
        for number in range(rounds + 1):
            with handle.switched(False):
                base = _times(model, plain, new_tokens)
            row = [*base, *_times(model, prefixed, new_tokens)]
            if number:
                times.append(row)
    table = np.array(times)
    prefill, decode = table[:, 2] / table[:, 0], table[:, 3] / table[:, 1]
    typical = np.median(table, axis=0)
    return Cost(
        _spread(prefill),
        _spread(decode),
        (1e3 * float(typical[0]) / prompt_tokens, 1e3 * float(typical[1]) / (new_tokens - 1)),
    )


def _times(model: Any, ids: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and for the others."""

    def generate(count: int) -> float:
        started = time.perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=0,
        )
        return time.perf_counter() - started

    first = generate(1)
    return first, max(generate(new_tokens) - first, 1e-9)


def _spread(ratios: np.ndarray) -> tuple[float, float, float]:
    return float(np.median(ratios)), float(ratios.min()), float(ratios.max())
