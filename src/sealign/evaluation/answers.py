"""Answers of the base model and of the edited model to the same prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sealign.edits.attach import apply_edit
from sealign.edits.intervention import Intervention
from sealign.edits.provenance import warn_of_other_tokenizer
from sealign.errors import SettingError
from sealign.models.eval_mode import eval_mode
from sealign.models.generation import generate_ids, room_for_answer
from sealign.models.prompt_format import PromptFormat, PromptStyle
from sealign.models.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answers:
    """A prompt and its two answers.

    Attributes:
        prompt: The prompt.
        base: Answer of the base model.
        edited: Answer of the edited model.
    """

    prompt: str
    base: str
    edited: str


@torch.no_grad()
def compare_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edit: Intervention,
    prompts: Sequence[str],
    *,
    prompt_format: PromptFormat = PromptFormat(),
    strength: float | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    base: Sequence[str] | None = None,
    ignore_mismatch: bool = False,
) -> list[Answers]:
    """Answer prompts with and without an edit.

    An edit that is not causal runs one prompt at a time and without a cache, the only way in which it is defined.

    Args:
        model: The base model.
        tokenizer: Tokenizer of the model.
        edit: The edit, or another intervention. If it puts text before prompts, they are written in a few-shot style,
            inside the chat template if the tokenizer has one.
        prompts: Prompts to answer; none may be empty.
        prompt_format: How prompts are written.
        strength: Strength to use instead of the edit's own.
        max_new_tokens: Maximum number of tokens of an answer.
        sampling: How tokens are drawn; greedy decoding if None.
        base: Answers of the base model, if they are known from an earlier call with the same arguments.
        ignore_mismatch: Whether to accept a model with another fingerprint.

    Raises:
        FingerprintError: The model is not the one that the edit was fitted on.
        SettingError: The strength is not finite, the method has no strength, or a prompt is empty or longer than the
            context of the model; or ``sampling`` is given and the method decodes in its own way.
    """
    check_sampling(edit, sampling)
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise SettingError(f"prompt {number} of {len(prompts)} is empty; write a question")
    if not ignore_mismatch:
        warn_of_other_tokenizer(tokenizer, edit)
    plain = _encoded(model, tokenizer, prompts, prompt_format, "")
    prefixed = _encoded(model, tokenizer, prompts, prompt_format, edit.prefix) if edit.prefix else plain
    longest = max(len(ids) for ids in [*plain, *prefixed])
    max_new_tokens = min(max_new_tokens, room_for_answer(model, longest, "the longest prompt", "shorten it"))
    with eval_mode(model), apply_edit(model, edit, strength=strength, ignore_mismatch=ignore_mismatch) as handle:
        if base is None:
            with handle.switched(False):
                base = _answer(model, tokenizer, plain, max_new_tokens, sampling)
        if edit.is_causal:
            edited = _answer(model, tokenizer, prefixed, max_new_tokens, sampling)
        else:
            edited = [
                _answer(model, tokenizer, [ids], max_new_tokens, sampling, use_cache=False)[0] for ids in prefixed
            ]
    return [Answers(*row) for row in zip(prompts, base, edited, strict=True)]


def check_sampling(edit: Intervention, sampling: Sampling | None) -> None:
    """Raise an error if answers are to be sampled with a method that decodes in its own way.

    Args:
        edit: The edit, or another intervention.
        sampling: How tokens are drawn; greedy decoding if None.

    Raises:
        SettingError: The method chooses among answers that it samples itself.
    """
    if sampling is not None and not edit.changes_scores:
        raise SettingError(
            f"temperature is {sampling.temperature:g}, but {edit.method} samples at a temperature of its own; leave it "
            "out, or fit the method with another temperature"
        )


def _encoded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    prompt_format: PromptFormat,
    prefix: str,
) -> list[list[int]]:
    if prefix:
        prompt_format = prompt_format.resolve(tokenizer)
        style: PromptStyle = "few_shot_chat" if prompt_format.style.endswith("chat") else "few_shot"
        prompt_format = dataclasses.replace(prompt_format, style=style, preamble=prefix.strip())
    encoded = [prompt_format.encode_prompt(tokenizer, prompt) for prompt in prompts]
    for number, ids in enumerate(encoded, start=1):
        room_for_answer(model, len(ids), f"prompt {number} of {len(prompts)}", "shorten it")
    return encoded


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None,
    *,
    use_cache: bool = True,
) -> list[str]:
    ids = generate_ids(model, tokenizer, prompts, max_new_tokens, use_cache=use_cache, sampling=sampling)
    texts = [tokenizer.decode([token for token in row if token >= 0], skip_special_tokens=True) for row in ids.tolist()]
    return [str(text).strip() for text in texts]
