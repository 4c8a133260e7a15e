"""Scores against one plain forward pass per continuation, on every architecture."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import sealign
from sealign.errors import SettingError
from sealign.evaluation.choices import ChoiceRequest, ChoiceScore
from sealign.evaluation.scoring import score_choices, score_continuations
from tests.tiny_models import CONFIGS, OTHER_CONFIGS


@torch.no_grad()
def plain_scores(model: Any, requests: list[ChoiceRequest]) -> list[list[tuple[float, bool]]]:
    """Score each continuation in a sequence of its own, without cache, batch, packing or logits_to_keep.

    Its last token is only predicted: an edit that depends on all tokens of a text must not see it.
    """
    scores = []
    for request in requests:
        row = []
        for tokens in request.continuations:
            ids = torch.tensor([[*request.context, *tokens[:-1]]])
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


@contextmanager
def forward_calls(model: Any) -> Iterator[list[int]]:
    """Collect the number of tokens of each forward pass of a model."""
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _m, _args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    yield sizes
    hook.remove()


@pytest.mark.filterwarnings("ignore:packed scores of GPTNeo")
@pytest.mark.parametrize("name", [*CONFIGS, *OTHER_CONFIGS])
@pytest.mark.parametrize("shared", [0, 21], ids=["no preamble", "preamble"])
def test_against_plain_passes(name: str, shared: int, tiny_model: Callable[[str], Any]) -> None:
    model, requests = tiny_model(name), make_requests(shared)
    _agree(score_choices(model, requests, pack_tokens=40), plain_scores(model, requests))


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


def test_every_row_is_reported_as_it_is_scored(llama: Any) -> None:
    requests = make_requests(0)
    reported: dict[Any, Any] = {}
    found = score_choices(llama, requests, pack_tokens=16, on_scored=reported.update)
    assert [reported[index] for index in range(len(requests))] == found


def test_the_common_prefix_runs_once(llama: Any) -> None:
    requests = make_requests(40)
    with forward_calls(llama) as sizes:
        score_choices(llama, requests)
        compared = sum(sizes)
        score_choices(llama, requests)
    assert sum(sizes) - compared <= 40 + sum(request.length - 40 for request in requests) + 1


def test_an_edit_that_depends_on_later_tokens_runs_one_text_at_a_time(llama: Any, small_edit: sealign.Edit) -> None:
    for shared in (0, 15):
        requests = make_requests(shared, count=3)
        with sealign.apply_edit(llama, small_edit.with_normalization("feature")):
            _agree(score_choices(llama, requests), plain_scores(llama, requests))


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [
        ((5,) * 250, (6,) * 8, "is 258 tokens long with its longest continuation, but the context of the model is 256"),
        ((), (6,), "context or continuation without tokens"),
        ((5,), (), "context or continuation without tokens"),
    ],
)
def test_requests_that_cannot_be_scored_are_refused(context: Any, continuation: Any, message: str, llama: Any) -> None:
    requests = [ChoiceRequest((5,) * 250, ((6,) * 7,)), ChoiceRequest(context, (continuation,))]
    with pytest.raises(SettingError, match=f"request 2 of 2 (is|has).*{message[-30:]}"):
        score_choices(llama, requests)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_continuations_as_texts_and_as_token_ids(name: str, tokenizer: Any, tiny_model: Callable[[str], Any]) -> None:
    model, form = tiny_model(name), sealign.PromptFormat("chat")
    texts = [("What is ice?", "Frozen water."), ("Who bakes?", "The baker does."), ("What is ice?", "Glass.")]
    pairs: list[Any] = [*texts, ([9, 8, 7], [6, 5]), ((9, 8, 7), (4,))]
    found = score_continuations(model, tokenizer, *zip(*pairs, strict=True), prompt_format=form)
    for index, (prompt, continuation) in enumerate(pairs):
        start = len(form.encode_prompt(tokenizer, prompt)) if isinstance(prompt, str) else len(prompt)
        ids = form.encode(tokenizer, prompt, continuation) if isinstance(prompt, str) else [*prompt, *continuation]
        logs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
        expected = sum(float(logs[i - 1, ids[i]]) for i in range(start, len(ids)))
        assert found.log_probabilities[index] == pytest.approx(expected, abs=1e-3)
        assert found.tokens[index] == len(ids) - start


def test_pairs_that_do_not_match_are_refused(llama: Any, tokenizer: Any) -> None:
    with pytest.raises(SettingError, match="2 prompts and 1 continuations"):
        score_continuations(llama, tokenizer, ["a", "b"], ["c"])
    with pytest.raises(SettingError, match="are a text and token ids"):
        score_continuations(llama, tokenizer, ["a"], [[5]])


@pytest.mark.slow
def test_real_model_within_a_thousandth(smollm2: Any) -> None:
    model, _ = smollm2
    requests = make_requests(30, count=5, vocabulary=40_000)
    found = score_choices(model, requests)
    _agree(found, plain_scores(model, requests))
