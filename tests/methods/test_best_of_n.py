"""Best-of-N: the answer that is kept, and what stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import sealign
from sealign.edits.attach import apply_edit
from sealign.errors import SettingError
from sealign.evaluation.scoring import ChoiceRequest, score_choices
from sealign.methods.best_of_n import _after_end
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
    """All of the last run of padding but its first token, which may be the end token of the answer."""
    new = torch.tensor([[5, 0, 6, 7], [5, 6, 0, 0], [0, 0, 0, 0], [5, 6, 7, 0]])
    expected = [[False] * 4, [False, False, False, True], [False, True, True, True], [False] * 4]
    assert _after_end(new, 0).tolist() == expected
    assert not _after_end(new, None).any()


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
