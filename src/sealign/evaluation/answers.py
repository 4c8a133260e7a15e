"""Answers of the base and the edited model to the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sealign.edits.edit import Edit
from sealign.errors import SettingError
from sealign.methods.registry import Change, apply_change, prefix_of
from sealign.models.eval_mode import eval_mode
from sealign.models.generation import generate_ids, room_for_answer
from sealign.models.prompt_format import PromptFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answers:
    """A prompt with two answers.

    Attributes:
        prompt: what was asked.
        base: the answer of the unedited model.
        edited: the answer of the edited model.
    """

    prompt: str
    base: str
    edited: str


@torch.no_grad()
def compare_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edit: Change,
    prompts: Sequence[str],
    *,
    prompt_format: PromptFormat = PromptFormat(),
    strength: float | None = None,
    max_new_tokens: int = 64,
    ignore_mismatch: bool = False,
) -> list[Answers]:
    """Answer prompts greedily with and without an edit, or another method.

    An edit that is rescaled per feature is run one prompt at a time and without a cache, the only way
    in which it is defined.

    Args:
        model: the base model.
        tokenizer: its own.
        edit: the edit or the method. One that puts demonstrations in the context writes its prompts in a few-shot
            style, inside the chat template where the tokenizer has one.
        prompts: at least 1.
        prompt_format: how prompts are written.
        strength: in place of a spectral edit's own.
        max_new_tokens: length of an answer, at most.
        ignore_mismatch: as for ``attach``.

    Raises:
        FingerprintError: the model is not the edit's.
        SettingError: the strength is not finite or not a spectral edit's, or a prompt is empty or longer than the
            model's context.
    """
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise SettingError(f"prompt {number} of {len(prompts)} is empty; write something to be answered")
    per_feature = isinstance(edit, Edit) and edit.settings.normalization == "feature"
    if strength is not None:
        if not isinstance(edit, Edit):
            raise SettingError(f"strength is {strength}, but only spectral edits have one; leave it out")
        edit = edit.with_settings(strength=strength)
    plain, prefixed = _encoded(model, tokenizer, prompts, prompt_format, ""), None
    if prefix_of(edit):
        prefixed = _encoded(model, tokenizer, prompts, prompt_format, prefix_of(edit))
    longest = max(len(ids) for ids in [*plain, *(prefixed or [])])
    max_new_tokens = min(max_new_tokens, room_for_answer(model, longest, "the longest prompt", "shorten it"))
    with eval_mode(model), apply_change(model, edit, ignore_mismatch=ignore_mismatch) as handle:
        with handle.switched(False):
            base = _answer(model, tokenizer, plain, max_new_tokens)
        if per_feature:
            edited = [_answer(model, tokenizer, [ids], max_new_tokens, use_cache=False)[0] for ids in plain]
        else:
            edited = _answer(model, tokenizer, prefixed or plain, max_new_tokens)
    return [Answers(*row) for row in zip(prompts, base, edited, strict=True)]


def _encoded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    prompt_format: PromptFormat,
    prefix: str,
) -> list[list[int]]:
    if prefix:
        chats = prompt_format.resolve(tokenizer).style.endswith("chat")
        prompt_format = PromptFormat("few_shot_chat" if chats else "few_shot", prefix.strip())
    encoded = [prompt_format.encode_prompt(tokenizer, prompt) for prompt in prompts]
    for number, ids in enumerate(encoded, start=1):
        room_for_answer(model, len(ids), f"prompt {number} of {len(prompts)}", "shorten it")
    return encoded


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    use_cache: bool = True,
) -> list[str]:
    ids = generate_ids(model, tokenizer, prompts, max_new_tokens, use_cache=use_cache)
    texts = [tokenizer.decode([token for token in row if token >= 0], skip_special_tokens=True) for row in ids.tolist()]
    return [str(text).strip() for text in texts]
