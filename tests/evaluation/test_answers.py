from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import sealign
from sealign.errors import FingerprintError, SettingError
from sealign.evaluation.answers import Answers, compare_answers
from sealign.models import generation
from sealign.models.generation import room_for_answer
from sealign.models.prompt_format import PromptFormat
from tests.conftest import our_hooks
from tests.tiny_models import build_model

PROMPTS = ["What is ice?", "Who bakes bread in the town by the river?", "Why?"]
PLAIN = PromptFormat("plain")


def greedy(model: Any, tokenizer: Any, prompt: str, length: int, form: PromptFormat = PLAIN) -> str:
    """Return the greedy answer by definition: repeatedly the most probable token, without a cache."""
    ids = form.encode_prompt(tokenizer, prompt)
    start = len(ids)
    with torch.no_grad():
        for _ in range(length):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True)).strip()


def test_answers_are_greedy_with_and_without_the_edit(llama: Any, tokenizer: Any, small_edit: sealign.Edit) -> None:
    base = [greedy(llama, tokenizer, prompt, 7) for prompt in PROMPTS]
    with sealign.apply_edit(llama, small_edit):
        edited = [greedy(llama, tokenizer, prompt, 7) for prompt in PROMPTS]
    found = compare_answers(llama, tokenizer, small_edit, PROMPTS, prompt_format=PLAIN, max_new_tokens=7)
    assert found == [Answers(*row) for row in zip(PROMPTS, base, edited, strict=True)]
    assert base != edited


@pytest.mark.parametrize("normalization", ["token", "feature", "none"])
def test_an_answer_does_not_depend_on_the_other_prompts(
    llama: Any, tokenizer: Any, small_edit: sealign.Edit, normalization: Any
) -> None:
    edit = small_edit.with_normalization(normalization)
    together = compare_answers(llama, tokenizer, edit, PROMPTS, max_new_tokens=6)
    alone = [compare_answers(llama, tokenizer, edit, [prompt], max_new_tokens=6)[0] for prompt in PROMPTS]
    assert together == alone


def test_rescaling_per_feature_sees_the_whole_sequence(llama: Any, tokenizer: Any, small_edit: sealign.Edit) -> None:
    edit = small_edit.with_normalization("feature")
    found = compare_answers(llama, tokenizer, edit, PROMPTS, prompt_format=PLAIN, max_new_tokens=5)
    with sealign.apply_edit(llama, edit):
        assert [answer.edited for answer in found] == [greedy(llama, tokenizer, prompt, 5) for prompt in PROMPTS]


def test_another_strength_than_that_of_the_edit(llama: Any, tokenizer: Any, small_edit: sealign.Edit) -> None:
    none = compare_answers(llama, tokenizer, small_edit, PROMPTS, strength=0.0, max_new_tokens=6)
    assert [answer.edited for answer in none] == [answer.base for answer in none]
    strong = compare_answers(llama, tokenizer, small_edit, PROMPTS, strength=2.0, max_new_tokens=6)
    assert strong == compare_answers(llama, tokenizer, small_edit.with_strength(2.0), PROMPTS, max_new_tokens=6)
    with pytest.raises(SettingError, match="must be finite"):
        compare_answers(llama, tokenizer, small_edit, PROMPTS, strength=float("nan"))


def test_the_model_is_unchanged_afterwards(tokenizer: Any, small_edit: sealign.Edit) -> None:
    model = build_model("llama", vocab_size=len(tokenizer)).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    compare_answers(model, tokenizer, small_edit, PROMPTS, max_new_tokens=2)
    assert model.training
    assert our_hooks(model) == 0
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    with pytest.raises(SettingError):
        compare_answers(model, tokenizer, small_edit, [""], max_new_tokens=2)
    assert our_hooks(model) == 0


def test_end_tokens_end_an_answer(tokenizer: Any, small_edit: sealign.Edit) -> None:
    prompt = PROMPTS[0]
    model = build_model("llama", vocab_size=len(tokenizer))
    text = greedy(model, tokenizer, prompt, 6)
    ids = PLAIN.encode_prompt(tokenizer, prompt)
    new = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :].tolist()
    third = next(token for token in new if token != new[0])
    model.generation_config.eos_token_id = third
    found = compare_answers(model, tokenizer, small_edit, [prompt], prompt_format=PLAIN, max_new_tokens=6)
    expected = tokenizer.decode(new[: new.index(third)], skip_special_tokens=True).strip()
    assert found[0].base == expected
    assert text.startswith(expected)


def test_empty_prompts_are_refused(llama: Any, tokenizer: Any, small_edit: sealign.Edit) -> None:
    for prompts, message in (([" "], "prompt 1 of 1 is empty"), (["a", "b", ""], "prompt 3 of 3 is empty")):
        with pytest.raises(SettingError, match=message):
            compare_answers(llama, tokenizer, small_edit, prompts)


def test_prompts_and_answers_fit_into_the_context(
    tiny_model: Any, tokenizer: Any, demonstrations: list[sealign.Demonstration]
) -> None:
    # Learnt positions: one token more than the context would be an index error in the model.
    model = tiny_model("gpt2")
    config = sealign.SEAConfig(rank=2, layers=(1, 2), prompt_format=PLAIN)
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=config)
    prompt = tokenizer.decode(tokenizer.encode("ice " * 300)[:250])
    length = len(PLAIN.encode_prompt(tokenizer, prompt))
    assert 240 < length < 256
    (answer,) = compare_answers(model, tokenizer, edit, [prompt], prompt_format=PLAIN, max_new_tokens=64)
    assert answer.base == greedy(model, tokenizer, prompt, 256 - length)
    with pytest.raises(SettingError, match=r"prompt 2 of 2 is \d+ tokens long, but the context of the model is 256"):
        compare_answers(model, tokenizer, edit, ["a", prompt * 2], prompt_format=PLAIN)


def test_room_for_answer(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert room_for_answer(llama, 255, "it", "cut it") == 1
    with pytest.raises(SettingError, match="it is 256 tokens long, but the context of the model is 256 .*; cut it"):
        room_for_answer(llama, 256, "it", "cut it")
    # Some architectures have no bound.
    monkeypatch.setattr(generation, "context_length", lambda _: None)
    assert room_for_answer(llama, 10**6, "it", "cut it") > 10**6


def test_another_model(tokenizer: Any, small_edit: sealign.Edit) -> None:
    model = build_model("llama", vocab_size=len(tokenizer), num_key_value_heads=4)
    with pytest.raises(FingerprintError, match="num_key_value_heads is 4 instead of 2"):
        compare_answers(model, tokenizer, small_edit, PROMPTS)
    found = compare_answers(model, tokenizer, small_edit, PROMPTS, ignore_mismatch=True, max_new_tokens=4)
    assert [answer.prompt for answer in found] == PROMPTS
    assert dataclasses.asdict(found[0]).keys() == {"prompt", "base", "edited"}
