"""Batched completions against a plain greedy loop over each prompt alone, and evaluation mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sealign.errors import ModelError, SealignWarning
from sealign.models.eval_mode import eval_mode
from sealign.models.generation import end_tokens, generate_ids
from sealign.models.sampling import Sampling
from tests.tiny_models import build_model

LENGTHS = (5, 1, 19, 8)
NEW = 7


def _mixed() -> nn.Module:
    """Modules in either mode, below parents in either mode."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)), nn.Linear(3, 2))
    model.train()
    model[1].eval()
    model[1][1].train()  # type: ignore[index]
    model[2].eval()
    return model


def _modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_every_module_gets_its_own_mode_back() -> None:
    model = _mixed()
    before = _modes(model)
    assert before == [True, True, False, False, True, False]
    with eval_mode(model):
        assert not any(_modes(model))
    assert _modes(model) == before


def test_modes_come_back_after_an_exception() -> None:
    model = _mixed()
    before = _modes(model)
    with pytest.raises(KeyboardInterrupt), eval_mode(model):
        raise KeyboardInterrupt
    assert _modes(model) == before


def test_a_model_in_evaluation_stays_there() -> None:
    model = _mixed().eval()
    with eval_mode(model), eval_mode(model):
        pass
    assert not any(_modes(model))


@pytest.fixture(scope="module")
def wide(tokenizer: Any) -> dict[str, Any]:
    """Models in float64, so that padding's rounding decides no token: rotary, learned and windowed positions."""
    return {name: build_model(name, vocab_size=len(tokenizer)).double() for name in ("llama", "opt", "gemma3")}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(4, 300, (length,), generator=generator).tolist() for length in LENGTHS]


@torch.no_grad()
def _greedy(model: Any, prompt: list[int]) -> list[int]:
    """The most likely next token, again and again: no padding, no cache, no end."""
    ids = list(prompt)
    for _ in range(NEW):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def _cut(tokens: list[int], ends: list[int]) -> list[int]:
    first = min((tokens.index(end) for end in ends if end in tokens), default=len(tokens))
    return tokens[:first] + [-1] * (len(tokens) - first)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["llama", "opt", "gemma3"])
def test_a_batch_is_each_prompt_alone(name: str, use_cache: bool, wide: Any, tokenizer: Any, prompts: Any) -> None:
    expected = [_greedy(wide[name], prompt) for prompt in prompts]
    assert len({tuple(row) for row in expected}) == len(LENGTHS)
    found = generate_ids(wide[name], tokenizer, prompts, NEW, use_cache=use_cache)
    assert found.tolist() == expected


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", ["one", "list", "all", "none"])
def test_nothing_from_the_end_token_on(
    kind: str, use_cache: bool, wide: Any, tokenizer: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wide["llama"]
    free = [_greedy(model, prompt) for prompt in prompts]
    listed = {
        "one": [free[0][3]],
        "list": [free[2][1], free[0][4]],
        "all": [free[0][2], free[1][1], free[2][4], free[3][0]],  # every row ends early
        "none": [],
    }[kind]
    given = {"one": listed[0] if listed else None, "none": None}.get(kind, listed)
    monkeypatch.setattr(model.generation_config, "eos_token_id", given)
    expected = [_cut(row, listed) for row in free]
    ended = sum(-1 in row for row in expected)
    assert ended == {"none": 0, "all": 4}.get(kind, ended)
    assert ended > 0 or kind == "none"
    found = generate_ids(model, tokenizer, prompts, NEW, use_cache=use_cache)
    assert found.shape == (len(LENGTHS), NEW)
    assert found.tolist() == expected
    ends = [next((token for token in row if token in listed), None) for row in free]
    kept = [[end if token == -1 and row.index(-1) == place else token for place, token in enumerate(row)]
            for row, end in zip(expected, ends, strict=True)]  # fmt: skip
    found = generate_ids(model, tokenizer, prompts, NEW, use_cache=use_cache, keep_end=True)
    assert found.tolist() == kept
    assert sorted(end_tokens(model)) == sorted(listed)


def test_a_prompt_may_hold_end_and_pad_tokens(
    wide: Any, tokenizer: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is new ends a completion, and a real token with the padding's id is seen."""
    model, end = wide["llama"], 1
    special = [[tokenizer.pad_token_id, *prompts[0], end], [*prompts[3], tokenizer.pad_token_id], prompts[2]]
    monkeypatch.setattr(model.generation_config, "eos_token_id", end)
    expected = [_cut(_greedy(model, prompt), [end]) for prompt in special]
    assert generate_ids(model, tokenizer, special, NEW).tolist() == expected


def test_without_a_cache_whole_sequences_are_run(wide: Any, tokenizer: Any, prompts: Any) -> None:
    widths: list[int] = []
    decoder = wide["llama"].model
    hook = decoder.register_forward_pre_hook(
        lambda _module, _args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for use_cache in (True, False):
        generate_ids(wide["llama"], tokenizer, prompts, 3, use_cache=use_cache)
    hook.remove()
    assert widths == [19, 1, 1, 19, 20, 21]


def test_nan_is_said_and_cannot_be_drawn_from(wide: Any, tokenizer: Any, prompts: Any) -> None:
    head = wide["llama"].lm_head
    hook = head.register_forward_hook(lambda _m, _i, out: out.index_fill(-1, torch.tensor([5]), torch.nan))
    try:
        with pytest.warns(SealignWarning, match="LlamaForCausalLM gives NaN as logits, so that its answers mean noth"):
            assert generate_ids(wide["llama"], tokenizer, prompts[:1], 3).shape == (1, 3)
        with pytest.raises(ModelError, match="gives NaN as logits"):
            generate_ids(wide["llama"], tokenizer, prompts[:1], 3, sampling=Sampling(temperature=0.5))
    finally:
        hook.remove()


# --- sampling ---


def test_a_low_temperature_is_greedy_and_the_seed_decides(wide: Any, tokenizer: Any, prompts: Any) -> None:
    model = wide["llama"]
    greedy = generate_ids(model, tokenizer, prompts, NEW).tolist()
    state = torch.random.get_rng_state()
    cold = generate_ids(model, tokenizer, prompts, NEW, sampling=Sampling(temperature=1e-4)).tolist()
    narrow = generate_ids(model, tokenizer, prompts, NEW, sampling=Sampling(temperature=1.0, top_p=1e-6)).tolist()
    assert cold == narrow == greedy
    warm = [
        generate_ids(model, tokenizer, prompts, NEW, sampling=Sampling(temperature=2.0, seed=seed)).tolist()
        for seed in (0, 0, 1)
    ]
    assert warm[0] == warm[1]
    assert len({str(found) for found in (warm[0], warm[2], greedy)}) == 3
    assert torch.equal(torch.random.get_rng_state(), state)


def test_samples_have_the_probabilities_of_the_model(wide: Any, tokenizer: Any) -> None:
    """Shares of 4,000 draws of one token at temperature 0.5 and p = 0.6, against the distribution by definition."""
    model, prompt, draws = wide["llama"], [7, 8, 9], 4000
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
    wanted = torch.softmax(logits / 0.5, -1)
    ordered, ids = wanted.sort(descending=True)
    kept = ordered.cumsum(0) - ordered < 0.6  # up to and with the one that reaches p
    wanted = torch.zeros_like(wanted).index_put((ids[kept],), ordered[kept] / ordered[kept].sum())
    assert 3 <= int(kept.sum()) < 40
    found = generate_ids(model, tokenizer, [prompt] * draws, 1, sampling=Sampling(temperature=0.5, top_p=0.6, seed=3))
    shares = torch.bincount(found[:, 0], minlength=len(wanted)) / draws
    assert (shares - wanted).abs().max() < 4 * 0.5 / draws**0.5
    assert not shares[wanted == 0].any()


def test_tokens_are_told_as_they_come(wide: Any, tokenizer: Any, prompts: Any) -> None:
    told: list[int] = []
    found = generate_ids(wide["llama"], tokenizer, prompts[:1], NEW, on_token=told.append)
    assert told == found[0].tolist()
