"""Answers to a batch against those to each prompt alone, and right-padded scores, on every architecture."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from sealign.errors import SealignWarning
from sealign.models.batching import pad_right
from sealign.models.generation import generate_ids
from sealign.models.prompt_batches import allowed_batching
from tests.tiny_models import CONFIGS, UNUSUAL_CONFIGS, build_model

LENGTHS = (5, 1, 19, 8, 5)
EQUAL, ALONE = {"recurrent_gemma"}, {"rwkv"}
"""Architectures that ignore the mask, and those that mix up the rows of a batch."""


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(4, 300, (length,), generator=generator).tolist() for length in LENGTHS]


def batching(name: str) -> str:
    return "equal" if name in EQUAL else "alone" if name in ALONE else "padded"


def by_hand(model: Any, prompt: list[int], length: int) -> list[int]:
    """The most likely next token, again and again: no batch, no padding, no cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(length):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.filterwarnings("ignore::sealign.errors.SealignWarning")
@pytest.mark.parametrize("name", sorted(CONFIGS | UNUSUAL_CONFIGS))
def test_a_batch_is_each_prompt_alone(name: str, tokenizer: Any, prompts: list[list[int]]) -> None:
    model = build_model(name, vocab_size=400)
    assert allowed_batching(model) == batching(name)
    found = generate_ids(model, tokenizer, prompts, 4)
    assert found.tolist() == [by_hand(model, prompt, 4) for prompt in prompts]


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(CONFIGS | UNUSUAL_CONFIGS))
def test_padding_after_a_text_changes_nothing_before_it(name: str, prompts: list[list[int]]) -> None:
    """What scoring and collecting rely on."""
    model = build_model(name, vocab_size=400)
    ids, mask = pad_right(prompts, 0, torch.device("cpu"))
    together = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    for row, prompt in zip(together, prompts, strict=True):
        alone = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
        torch.testing.assert_close(row[: len(prompt)], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bloom", "mpt", "gemma2"])
def test_a_mask_that_becomes_infinite(name: str, tokenizer: Any, prompts: list[list[int]]) -> None:
    """In float64 the rows of padding attend to nothing, and their NaN spreads."""
    model = build_model(name, vocab_size=400).double()
    with pytest.warns(SealignWarning, match="padding before a prompt gives NaN .* in float64; only prompts of equal"):
        found = generate_ids(model, tokenizer, prompts, 4)
    assert found.tolist() == [by_hand(model, prompt, 4) for prompt in prompts]
    assert allowed_batching(model.float()) == "padded"


@pytest.mark.parametrize(
    ("name", "words"), [("recurrent_gemma", "padding before a prompt changes"), ("rwkv", "a batch changes")]
)
def test_what_is_slower_is_said_once(name: str, words: str, tokenizer: Any, prompts: list[list[int]]) -> None:
    model = build_model(name, vocab_size=400)
    with pytest.warns(SealignWarning, match=f"{words} the next tokens .*, which is slower"):
        generate_ids(model, tokenizer, prompts, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate_ids(model, tokenizer, prompts, 1)
