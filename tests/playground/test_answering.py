"""The answers side by side are what ``generate`` of transformers gives for each alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import sealign
from sealign.edits.intervention import Intervention
from sealign.methods.composition import Composition
from sealign.models.sampling import Sampling
from sealign.playground.answering import answer_both
from tests.conftest import our_hooks

PROMPTS = {"base": [5, 9, 33, 41, 8], "edited": [5, 9, 33, 41, 8, 77, 12, 60]}
LENGTHS = {"base": 7, "edited": 11}


def both(
    model: Any, tokenizer: Any, edit: Intervention | None, sampling: Sampling | None = None
) -> tuple[dict[str, list[int]], list[str]]:
    """The tokens of both arms, and the arm of each token in the order in which they came."""
    found: dict[str, list[int]] = {"base": [], "edited": []}
    order: list[str] = []

    def on_token(arm: str, token: int) -> None:
        found[arm].append(token)
        order.append(arm)

    ended: list[str] = []
    answer_both(
        model,
        tokenizer,
        edit,
        PROMPTS,
        max_new_tokens=LENGTHS,
        sampling=sampling,
        on_token=on_token,
        on_end=ended.append,
    )
    assert sorted(ended) == ["base", "edited"]
    return found, order


@torch.no_grad()
def alone(model: Any, ids: Sequence[int], length: int, sampling: Sampling | None = None, **given: Any) -> list[int]:
    """What transformers generates, without any code of ours but the hooks."""
    settings: dict[str, Any] = {"do_sample": False}
    if sampling is not None:
        settings = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        torch.manual_seed(sampling.seed)
    prompt = torch.tensor([list(ids)])
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=length,
        pad_token_id=0,
        **settings,
        **given,
    )
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.3, top_p=0.9, seed=4)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["one", "composed", "none"])
def test_answers_are_those_of_generate(
    llama: Any, tokenizer: Any, small_edit: sealign.Edit, demonstrations: Any, kind: str, sampling: Sampling | None
) -> None:
    config = sealign.MeanDifferenceConfig(site="residual", layers=(1, 2), strength=2.5)
    shift = sealign.fit_edit(llama, tokenizer, demonstrations, config=config)
    small_edit = small_edit.with_strength(3.0)
    edit = {"one": small_edit, "composed": Composition([small_edit, shift]), "none": None}[kind]
    found, order = both(llama, tokenizer, edit, sampling)
    assert found["base"] == alone(llama, PROMPTS["base"], 7, sampling)
    if edit is None:
        assert found["edited"] == alone(llama, PROMPTS["edited"], 11, sampling)
    else:
        with sealign.apply_edit(llama, edit):
            assert found["edited"] == alone(llama, PROMPTS["edited"], 11, sampling)
        assert found["edited"] != alone(llama, PROMPTS["edited"], 11, sampling)
    # A token of each in turn, then what is left of the longer one.
    assert order == ["base", "edited"] * 7 + ["edited"] * 4
    assert our_hooks(llama) == 0


@pytest.mark.parametrize("name", ["gemma3", "mamba", "lfm2", "rwkv"])
def test_each_answer_has_a_cache_of_its_own(tiny_model: Any, tokenizer: Any, demonstrations: Any, name: str) -> None:
    """Sliding windows, recurrent states and short convolutions."""
    model = tiny_model(name)
    config = sealign.MeanDifferenceConfig(site="residual", layers=(1, 2), strength=4.0)
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=config)
    found, _ = both(model, tokenizer, edit)
    assert found["base"] == alone(model, PROMPTS["base"], 7)
    with sealign.apply_edit(model, edit):
        assert found["edited"] == alone(model, PROMPTS["edited"], 11)


@pytest.mark.parametrize(
    "config",
    [
        sealign.DoLaConfig(),
        sealign.ICDConfig(),
        sealign.LoRAFTConfig(learning_rate=0.05),
    ],
    ids=["dola", "icd", "lora_ft"],
)
def test_methods_that_change_decoding(llama: Any, tokenizer: Any, demonstrations: Any, config: Any) -> None:
    edit = sealign.fit_edit(llama, tokenizer, demonstrations, config=config)
    found, _ = both(llama, tokenizer, edit)
    assert found["base"] == alone(llama, PROMPTS["base"], 7)
    with sealign.apply_edit(llama, edit):
        assert found["edited"] == alone(llama, PROMPTS["edited"], 11)


def test_rescaling_per_feature_runs_without_a_cache(llama: Any, tokenizer: Any, small_edit: sealign.Edit) -> None:
    edit = small_edit.with_normalization("feature")
    found, _ = both(llama, tokenizer, edit)
    with sealign.apply_edit(llama, edit):
        assert found["edited"] == alone(llama, PROMPTS["edited"], 11, use_cache=False)


def test_an_end_token_ends_one_answer_only(llama: Any, tokenizer: Any, small_edit: sealign.Edit) -> None:
    third = alone(llama, PROMPTS["base"], 3)[2]
    llama.generation_config.eos_token_id = third
    try:
        found, _ = both(llama, tokenizer, small_edit)
    finally:
        llama.generation_config.eos_token_id = None
    assert found["base"][-1] == third
    assert len(found["base"]) <= 3
    assert len(found["edited"]) > len(found["base"])


def test_a_stop_leaves_the_model_as_it_was(llama: Any, tokenizer: Any, small_edit: sealign.Edit) -> None:
    seen = []

    def stop(arm: str, _: int) -> None:
        seen.append(arm)
        if len(seen) == 5:
            raise RuntimeError("enough")

    state = torch.get_rng_state()
    llama.train()
    try:
        with pytest.raises(RuntimeError, match="enough"):
            answer_both(
                llama,
                tokenizer,
                small_edit,
                PROMPTS,
                max_new_tokens=LENGTHS,
                sampling=Sampling(temperature=1.0),
                on_token=stop,
                on_end=lambda _: None,
            )
        assert llama.training
    finally:
        llama.eval()
    assert len(seen) == 5
    assert our_hooks(llama) == 0
    assert torch.equal(torch.get_rng_state(), state)
