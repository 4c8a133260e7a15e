from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sealign.models.batching import pad_left, pad_right, pad_token
from sealign.models.shared_prefix import Prefix, common_prefix, share_prefix
from sealign.models.structure import decoder_of, input_device
from tests.tiny_models import CONFIGS, UNUSUAL_CONFIGS, build_model

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=8)


@given(st.lists(TOKENS, min_size=1, max_size=6))
def test_common_prefix_is_the_longest_that_leaves_a_token(sequences: list[list[int]]) -> None:
    prefix = common_prefix(sequences)
    length = len(prefix)
    assert all(sequence[:length] == prefix and len(sequence) > length for sequence in sequences)
    longer = [sequence[: length + 1] for sequence in sequences]
    assert any(len(s) == length + 1 for s in sequences) or any(part != longer[0] for part in longer)


def test_no_sequences_share_nothing() -> None:
    assert common_prefix([]) == []


def test_padding_is_on_one_side_and_masked() -> None:
    ids, mask = pad_right([[5, 6, 7], [8]], 9, torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = pad_left([[5, 6, 7], [8]], 9, torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_continued_prefix_is_the_whole_sequence(name: str, tiny_model: Callable[[str], Any]) -> None:
    model = tiny_model(name)
    shared = torch.randint(4, 90, (21,)).tolist()  # longer than the sliding window of the models that have one
    tails = [torch.randint(4, 90, (length,)).tolist() for length in (5, 2, 9)]
    prefix = Prefix.run(decoder_of(model), shared, input_device(model))
    assert prefix.ids == shared
    ids, mask = pad_right(tails, 0, torch.device("cpu"))
    for _ in range(2):  # the prefix's cache is not used up
        states = prefix.continue_batch(decoder_of(model), ids, mask).last_hidden_state
        for row, tail in enumerate(tails):
            alone = decoder_of(model)(input_ids=torch.tensor([shared + tail])).last_hidden_state[0, len(shared) :]
            torch.testing.assert_close(states[row, : len(tail)], alone, rtol=1e-4, atol=1e-4)


WITHOUT_REPEATABLE_CACHE = {
    "openai-gpt",
    "granite4_dense",
    "granite4_moe",
    "jamba",
    "lfm2",
    "qwen3_next",
    "qwen3_5_text",
    "falcon_h1",
    "recurrent_gemma",
    "mamba",
    "mamba2",
    "rwkv",
}
"""Architectures without a cache, or with states of recurrent layers that transformers cannot repeat for a batch."""


@pytest.mark.parametrize("name", UNUSUAL_CONFIGS)
@torch.no_grad()
def test_caches_that_cannot_be_repeated_are_not_used(name: str, tiny_model: Callable[[str], Any]) -> None:
    model = tiny_model(name)
    shared = torch.randint(4, 90, (18,)).tolist()  # longer than the sliding windows
    tails = [torch.randint(4, 90, (length,)).tolist() for length in (4, 2)]
    prefix = Prefix.run(decoder_of(model), shared, input_device(model))
    assert (prefix.cache is None) == (name in WITHOUT_REPEATABLE_CACHE)
    rest = [(shared + tail)[len(prefix.ids) :] for tail in tails]
    ids, mask = pad_right(rest, 0, torch.device("cpu"))
    states = prefix.continue_batch(decoder_of(model), ids, mask)[0]
    for row, tail in enumerate(tails):
        alone = decoder_of(model)(input_ids=torch.tensor([shared + tail]))[0][0, len(prefix.ids) :]
        torch.testing.assert_close(states[row, : len(rest[row])], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fault", ["raises", "differs", "none"])
@torch.no_grad()
def test_a_model_that_continues_a_prefix_wrongly_runs_whole(fault: str, tokenizer: Any) -> None:
    """Such as MiniMax, whose cache has a state that is not repeated for a batch; two runs are compared once."""
    decoder = decoder_of(build_model("llama", vocab_size=len(tokenizer)))
    calls: list[int] = []

    def spoil(_module: Any, _args: Any, kwargs: Any) -> Any:
        calls.append(kwargs["input_ids"].numel())
        if fault == "none" or kwargs.get("past_key_values") is None:
            return None
        if fault == "raises":
            raise IndexError("list index out of range")
        return (), kwargs | {"input_ids": kwargs["input_ids"].flip(0)}

    decoder.register_forward_pre_hook(spoil, with_kwargs=True)
    shared = torch.randint(4, 90, (21,)).tolist()
    for _ in range(2):
        assert Prefix.run(decoder, shared, torch.device("cpu")).ids == (shared if fault == "none" else [])
    assert calls == [8, 22, 6] + [21, 21] * (fault == "none")


@torch.no_grad()
def test_short_prefixes_are_not_worth_a_run(llama: Any) -> None:
    prefix = Prefix.run(decoder_of(llama), [5, 6, 7], torch.device("cpu"))
    assert (prefix.ids, prefix.cache) == ([], None)
    ids, mask = pad_right([[5, 6, 7], [8]], 0, torch.device("cpu"))
    states = prefix.continue_batch(decoder_of(llama), ids, mask).last_hidden_state
    torch.testing.assert_close(states[1, :1], decoder_of(llama)(input_ids=torch.tensor([[8]])).last_hidden_state[0])


GENERATING = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "opt", "olmo2"])
@torch.no_grad()
def test_generation_from_a_shared_prefix_is_that_of_each_row_alone(name: str, tiny_model: Callable[[str], Any]) -> None:
    model = copy.deepcopy(tiny_model(name)).double()
    shared = torch.randint(4, 90, (12,)).tolist()
    rows = [shared + torch.randint(4, 90, (length,)).tolist() for length in (5, 1, 9)]
    ids = torch.tensor([[0] * (21 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (21 - len(row)) + [1] * len(row) for row in rows])
    found = share_prefix(model, ids, mask)
    assert found is not None
    moved, seen, cache = found
    assert cache.get_seq_length() >= 12
    assert [row[own.bool()].tolist() for row, own in zip(moved, seen, strict=True)] == rows
    after = model.generate(moved, attention_mask=seen, past_key_values=cache, **GENERATING)
    for number, row in enumerate(rows):
        alone = model.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row)), **GENERATING)
        assert after[number, 21:].tolist() == alone[0, len(row) :].tolist()


@torch.no_grad()
def test_rows_that_share_too_little(llama: Any) -> None:
    ids, mask = pad_right([[5, 6, 7, 8], [5, 6, 9, 8]], 0, torch.device("cpu"))
    assert share_prefix(llama, ids, mask) is None
    assert share_prefix(llama, ids[:1], mask[:1]) is None


def test_pad_token_is_any_token_that_the_model_embeds(tokenizer: Any, llama: Any) -> None:
    assert pad_token(tokenizer, llama) == tokenizer.pad_token_id

    class Bare:
        pad_token_id: int | None = None
        eos_token_id = None
        unk_token_id = 7

    assert pad_token(Bare(), llama) == 7
    assert pad_token(object(), llama) == 0
    added = Bare()  # to the vocabulary of the tokenizer, but not to the embedding
    added.pad_token_id = llama.get_input_embeddings().weight.shape[0]
    assert pad_token(added, llama) == 7
