"""Packed scoring against one plain forward pass per continuation."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sealign
from sealign.evaluation.scoring import ChoiceRequest, ChoiceScore, _pack, score_choices, supports_packing
from tests.tiny_models import CONFIGS, build_model


@torch.no_grad()
def plain_scores(model: Any, requests: list[ChoiceRequest]) -> list[list[tuple[float, bool]]]:
    """Score each continuation in a sequence of its own, without cache, batch, packing or logits_to_keep."""
    scores = []
    for request in requests:
        row = []
        for tokens in request.continuations:
            ids = torch.tensor([[*request.context, *tokens]])
            logs = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].double(), dim=-1)
            start = len(request.context)
            value = float(sum(logs[start + i - 1, token] for i, token in enumerate(tokens)))
            row.append((value, all(int(logs[start + i - 1].argmax()) == token for i, token in enumerate(tokens))))
        scores.append(row)
    return scores


def _agree(found: list[list[ChoiceScore]], expected: list[list[tuple[float, bool]]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert [score.log_probability for score in ours] == pytest.approx([value for value, _ in theirs], abs=1e-3)
        assert [score.greedy for score in ours] == [greedy for _, greedy in theirs]


def make_requests(shared: int, *, count: int = 7, vocabulary: int = 90, seed: int = 0) -> list[ChoiceRequest]:
    """Return requests of unequal lengths with unequal numbers of continuations, some of one token."""
    generator = random.Random(seed)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(generator.randrange(4, vocabulary) for _ in range(length))

    preamble = tokens(shared)
    return [
        ChoiceRequest(
            preamble + tokens(generator.randint(1, 6)),
            tuple(tokens(generator.randint(1, 5)) for _ in range(generator.randint(1, 4))),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shared", [0, 21], ids=["no preamble", "preamble"])
def test_against_plain_passes(name: str, shared: int, tiny_model: Callable[[str], Any]) -> None:
    model, requests = tiny_model(name), make_requests(shared)
    found = score_choices(model, requests, pack_tokens=24)
    _agree(found, plain_scores(model, requests))


def test_in_float64(llama: Any) -> None:
    model, requests = copy.deepcopy(llama).double(), make_requests(21)
    _agree(score_choices(model, requests), plain_scores(model, requests))


def test_with_an_edit_on_the_model(llama: Any, small_edit: sealign.Edit) -> None:
    requests = make_requests(15)
    base = score_choices(llama, requests)
    with sealign.apply_edit(llama, small_edit):
        edited = score_choices(llama, requests)
        expected = plain_scores(llama, requests)
    _agree(edited, expected)
    changes = [abs(a[0] - b[0]) for x, y in zip(base, edited, strict=True) for a, b in zip(x, y, strict=True)]
    assert max(changes) > 0.05


def test_greedy_continuations_are_recognised(llama: Any) -> None:
    ids = torch.tensor([[9, 17, 33]])
    out = llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)[0, 3:].tolist()
    other = [out[0], (out[1] + 1) % 90, out[2]]
    (scores,) = score_choices(llama, [ChoiceRequest((9, 17, 33), (tuple(out), tuple(other), tuple(out[:1])))])
    assert [score.greedy for score in scores] == [True, False, True]


def test_models_that_do_not_support_packing_are_recognised(tokenizer: Any, tiny_model: Callable[[str], Any]) -> None:
    assert all(supports_packing(tiny_model(name)) for name in CONFIGS)
    assert not supports_packing(build_model("falcon", vocab_size=len(tokenizer), alibi=True))


def test_every_row_is_reported_as_it_is_scored(llama: Any) -> None:
    requests = make_requests(0)
    reported: dict[Any, Any] = {}
    found = score_choices(llama, requests, pack_tokens=16, on_scored=reported.update)
    assert [reported[index] for index in range(len(requests))] == found


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), capacity=st.integers(1, 40))
def test_packing_keeps_every_request_and_the_capacity(lengths: list[int], capacity: int) -> None:
    requests = [(index, ChoiceRequest((1,) * length, ((2,),))) for index, length in enumerate(lengths)]
    rows = list(_pack(requests, 0, capacity))
    assert sorted(index for row in rows for index, _ in row) == list(range(len(lengths)))
    for row in rows:
        assert len(row) == 1 or sum(request.length for _, request in row) <= capacity


def test_the_common_prefix_runs_once(llama: Any) -> None:
    sizes: list[int] = []
    hook = llama.model.register_forward_pre_hook(
        lambda _m, _args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    requests = make_requests(40)
    score_choices(llama, requests)
    hook.remove()
    assert sum(sizes) <= 40 + sum(request.length - 40 for request in requests) + 1


@pytest.mark.slow
def test_real_model_within_a_thousandth(smollm2: Any) -> None:
    model, _ = smollm2
    requests = make_requests(30, count=5, vocabulary=40_000)
    found = score_choices(model, requests)
    _agree(found, plain_scores(model, requests))
