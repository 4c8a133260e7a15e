"""Cost of an edit at inference: run times of the edited model relative to the base model in the same run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sealign.edits.attach import apply_edit
from sealign.edits.intervention import Intervention
from sealign.errors import SettingError
from sealign.models.eval_mode import eval_mode
from sealign.models.structure import input_device, text_config, unwrap_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Cost:
    """Run times of the edited model divided by the run times of the base model, round by round.

    Attributes:
        prefill: Median, lowest and highest ratio of the times to process a prompt; 1 means no cost.
        decode: The same for generating the tokens after the first.
        base_milliseconds: Median time per token of the base model in milliseconds, in prefill and in decoding.
    """

    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    base_milliseconds: tuple[float, float]


@torch.no_grad()
def measure_cost(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edit: Intervention,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 16,
    rounds: int = 5,
) -> Cost:
    """Time the base model and the edited model alternately, and return the ratios.

    Args:
        model: The base model.
        tokenizer: Tokenizer of the model; encodes the text that an intervention puts before prompts.
        edit: The edit, or another intervention.
        prompt_tokens: Number of random tokens in the prompt. Must be at least 1.
        new_tokens: Number of tokens to generate. Must be at least 2.
        rounds: Number of measured rounds, each of the base model and the edited model, after one round to warm up.
            Must be at least 1.

    Raises:
        SettingError: A number is below its bound.
    """
    bounds = {"prompt_tokens": (prompt_tokens, 1), "new_tokens": (new_tokens, 2), "rounds": (rounds, 1)}
    for name, (value, bound) in bounds.items():
        if value < bound:
            raise SettingError(f"{name} is {value}, but it must be at least {bound}")
    vocabulary = text_config(unwrap_model(model)).vocab_size
    drawn = torch.randint(vocabulary, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    before = torch.tensor([tokenizer.encode(edit.prefix)], dtype=torch.long).reshape(1, -1)
    plain, prefixed = (ids.to(input_device(model)) for ids in (drawn, torch.cat([before, drawn], dim=1)))
    times: list[list[float]] = []
    with eval_mode(model), apply_edit(model, edit) as handle:
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
    """Return the time to the first token and the time of all others, in seconds."""

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
