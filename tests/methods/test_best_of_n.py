"""Best-of-N: the answer that is kept, and what stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import sealign
from sealign.edits.attach import apply_edit
from sealign.errors import SettingError
from sealign.evaluation.choices import ChoiceRequest
from sealign.evaluation.scoring import score_choices
from sealign.methods.best_of_n import _after_end, _special_tokens
from sealign.models.batching import pad_right
from sealign.models.generation import generate_ids
from tests.tiny_models import logits


def test_it_keeps_the_likeliest_sample(fitted: Callable[[str], Any], llama: Any, tokenizer: Any) -> None:
    method = fitted("best_of_n")
    prompts = [tokenizer.encode(text) for text in ("The clerk asks for a form.", "Who?")]
    with apply_edit(llama, method):
        chosen = generate_ids(llama, tokenizer, prompts, 5)
        assert torch.equal(chosen, generate_ids(llama, tokenizer, prompts, 5))  # seeded
    samples = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(3):
            reverse = [list(reversed(prompt)) for prompt in prompts]
            ids, mask = (part.flip(1) for part in pad_right(reverse, 0, torch.device("cpu")))
            found = llama.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=True, temperature=0.7, top_p=0.95,
                top_k=0, pad_token_id=0,
            )  # fmt: skip
            samples.append(found[:, ids.shape[1] :])

    def mean_log(prompt: list[int], answer: list[int]) -> float:
        scored = score_choices(llama, [ChoiceRequest(tuple(prompt), (tuple(answer),))])
        return scored[0][0].log_probability / len(answer)

    for row, prompt in enumerate(prompts):
        values = [mean_log(prompt, sample[row].tolist()) for sample in samples]
        assert chosen[row].tolist() == samples[int(np.argmax(values))][row].tolist()


def test_it_leaves_scores_alone(fitted: Callable[[str], Any], llama: Any, tokenizer: Any) -> None:
    before = logits(llama, tokenizer)
    assert not fitted("best_of_n").changes_scores
    with apply_edit(llama, fitted("best_of_n")) as handle:
        assert torch.equal(logits(llama, tokenizer), before)
        ids = torch.tensor([tokenizer.encode("Who?")])
        with handle.switched(False):
            greedy = llama.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(greedy, llama.generate(input_ids=ids, max_new_tokens=4, do_sample=False))
    assert "generate" not in vars(llama)


def test_a_replaced_generate_is_put_back(fitted: Callable[[str], Any], llama: Any) -> None:
    def own(*_: Any, **__: Any) -> str:
        return "own"

    llama.generate = own
    try:
        with apply_edit(llama, fitted("best_of_n")):
            assert llama.generate is not own
        assert llama.generate is own
    finally:
        del llama.generate


def test_padding_after_an_answer_is_not_scored() -> None:
    """The end token belongs to the answer, also where it is the pad token; rows may end without one."""
    new = torch.tensor([[5, 0, 6, 7], [5, 2, 0, 0], [5, 2, 2, 2], [2, 0, 0, 0], [5, 6, 7, 0]])
    padding = {
        (): ["....", "....", "....", "....", "...."],
        (2,): ["....", "..xx", "..xx", ".xxx", "...x"],
        (2, 0): ["..xx", "..xx", "..xx", ".xxx", "...."],
    }
    for ends, expected in padding.items():
        found = _after_end(new, list(ends), 0)
        assert ["".join("x" if masked else "." for masked in row) for row in found.tolist()] == expected


def test_special_tokens_are_those_of_the_call() -> None:
    def of(eos: Any, pad: Any, **call: Any) -> Any:
        base = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=eos, pad_token_id=pad))
        return _special_tokens(base, call)

    assert of(None, None) == ([], 0)
    assert of(2, None) == ([2], 2)
    assert of([4, 2], 7) == ([4, 2], 7)
    assert of(2, 7, pad_token_id=3) == ([2], 3)
    assert of(2, 7, eos_token_id=5) == ([5], 7)


def test_a_long_answer_is_judged_by_its_mean(fitted: Callable[[str], Any]) -> None:
    """Token 2 ends an answer and 0 pads it. The second answer has the lower sum and the higher mean."""
    answers = [(torch.tensor([[7, 7, 2, 0, 0, 0]]), [0.3, 1, 1, 1]), (torch.tensor([[7, 7, 5, 5, 5, 2]]), [0.5] * 4)]
    calls: list[dict[str, Any]] = []

    def generate(**kwargs: Any) -> Any:
        sequence, probabilities = answers[len(calls) % 2]
        calls.append(kwargs)
        steps = []
        for token, probability in zip(sequence[0, 2:], probabilities, strict=True):
            row = torch.full((1, 9), (1 - probability) / 8)
            row[0, token] = probability
            steps.append(row.log())
        return SimpleNamespace(sequences=sequence, logits=tuple(steps))

    base = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=2, pad_token_id=0))
    found = fitted("best_of_n").choose(base, generate, (), {"input_ids": torch.tensor([[7, 7]])})
    assert found.tolist() == [[7, 7, 5, 5, 5, 2]]
    assert len(calls) == 3
    assert all(call["do_sample"] and call["temperature"] == 0.7 and call["top_p"] == 0.95 for call in calls)


def test_it_chooses_among_answers_of_the_edited_model(fitted: Callable[[str], Any], llama: Any, tokenizer: Any) -> None:
    prompts = [tokenizer.encode("The clerk asks for a form.")]
    with apply_edit(llama, fitted("best_of_n")):
        plain = generate_ids(llama, tokenizer, prompts, 8)
    with apply_edit(llama, fitted("sea"), strength=3.0), apply_edit(llama, fitted("best_of_n")):
        edited = generate_ids(llama, tokenizer, prompts, 8)
    assert not torch.equal(plain, edited)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n is 0, but it must be at least 1"),
        ({"temperature": 0}, "temperature is 0, but it must be above 0; try 0.7"),
        ({"top_p": 0}, r"top_p is 0, but it must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p is 1.5, but it must be in \(0, 1\]"),
        ({"n": 2.5}, "n is 2.5, but it must be an integer"),
    ],
)
def test_settings_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        sealign.BestOfNConfig(**change)
