"""Log-likelihoods of continuations, for everything that scores: packed where that is right, else one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sealign.errors import SettingError
from sealign.evaluation.choices import ChoiceRequest, ChoiceScore, OnScored
from sealign.evaluation.packed_scoring import score_packed
from sealign.evaluation.packing import packs
from sealign.evaluation.plain_scoring import score_plain
from sealign.models.eval_mode import eval_mode
from sealign.models.prompt_format import PromptFormat
from sealign.models.structure import context_length
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACK_TOKENS = 512
"""Number of tokens in a packed row: longer rows waste attention on masked tokens, shorter ones leave cores idle."""


class ContinuationScores(NamedTuple):
    """Scores of n continuations.

    Attributes:
        log_probabilities: log p(continuation | prompt) in nats, summed over tokens, (n,). NaN if the model gives NaN.
        tokens: Number of tokens of each continuation, (n,).
    """

    log_probabilities: NDArray[np.float64]
    tokens: NDArray[np.int64]


def score_continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[int]],
    continuations: Sequence[str | Sequence[int]],
    *,
    prompt_format: PromptFormat = PromptFormat(),
    pack_tokens: int = PACK_TOKENS,
    track: Track = no_progress,
) -> ContinuationScores:
    """Return log p(continuation | prompt) of n pairs, with the edits that are attached to the model.

    Pairs with the same prompt share its computation, so repeat a prompt for each of its continuations. Scores are equal
    to those of one text at a time: pairs are packed into common rows only where that is right; see ``score_choices``.

    Args:
        model: The model.
        tokenizer: Tokenizer of the model.
        prompts: n prompts, each a text or the token ids that the model reads.
        continuations: n continuations, each of the same kind as its prompt.
        prompt_format: How prompts that are texts are written.
        pack_tokens: Maximum number of tokens in a row or batch; a longer sequence has one of its own.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.

    Raises:
        SettingError: The numbers or kinds of prompts and continuations differ, one of them has no tokens, or a pair is
            longer than the context of the model.

    Example:
        >>> import sealign
        >>> model, tokenizer = sealign.load_model("smollm2")
        >>> prompts = ["What is the capital of France?"] * 2
        >>> scores = score_continuations(model, tokenizer, prompts, ["Paris.", "Tokyo."])
        >>> scores.tokens.tolist()
        [2, 3]
        >>> bool(scores.log_probabilities[0] > scores.log_probabilities[1])
        True
    """
    if len(prompts) != len(continuations):
        raise SettingError(f"{len(prompts)} prompts and {len(continuations)} continuations; give one of each per pair")
    resolved = prompt_format.resolve(tokenizer)
    pairs = [_encode(tokenizer, resolved, *pair) for pair in zip(prompts, continuations, strict=True)]
    by_context: dict[tuple[int, ...], list[int]] = {}
    for index, (context, _) in enumerate(pairs):
        by_context.setdefault(context, []).append(index)
    requests = [ChoiceRequest(context, tuple(pairs[i][1] for i in of_it)) for context, of_it in by_context.items()]
    values = np.empty(len(pairs))
    scored = score_choices(model, requests, pack_tokens=pack_tokens, track=track)
    for indices, scores in zip(by_context.values(), scored, strict=True):
        values[indices] = [score.log_probability for score in scores]
    return ContinuationScores(values, np.array([len(tokens) for _, tokens in pairs], dtype=np.int64))


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    prompt: str | Sequence[int],
    continuation: str | Sequence[int],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the token ids of a prompt and of its continuation."""
    if isinstance(prompt, str) and isinstance(continuation, str):
        context = prompt_format.encode_prompt(tokenizer, prompt)
        return tuple(context), tuple(prompt_format.encode(tokenizer, prompt, continuation)[len(context) :])
    if isinstance(prompt, str) or isinstance(continuation, str):
        raise SettingError(
            f"prompt {prompt!r:.60} and continuation {continuation!r:.60} are a text and token ids; give two texts or "
            "two lists of token ids"
        )
    return tuple(map(int, prompt)), tuple(map(int, continuation))


@torch.no_grad()
def score_choices(
    model: PreTrainedModel,
    requests: Sequence[ChoiceRequest],
    *,
    pack_tokens: int = PACK_TOKENS,
    track: Track = no_progress,
    on_scored: OnScored | None = None,
) -> list[list[ChoiceScore]]:
    """Return log p(continuation | context) of every continuation, equal to that of one text at a time.

    Where the model allows it, several requests are packed into one row; the common prefix of all contexts then runs
    once, and each context once for all its continuations. The first long row of a model is compared with plain scores;
    if they differ, a warning says so, and the model is scored without packing from then on. With an edit that depends
    on later tokens, each text runs alone.

    Args:
        model: A decoder, with the edits that are attached to it.
        requests: Contexts and continuations.
        pack_tokens: Maximum number of tokens in a row or batch; a longer sequence has one of its own.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.
        on_scored: Called after each row with (index of the request, its scores) of the requests that are finished.

    Returns:
        For each request, the score of each continuation.

    Raises:
        SettingError: A context or continuation has no tokens, or both are longer than the context of the model.
    """
    _check_lengths(model, requests)
    scores: list[list[ChoiceScore]] = [[] for _ in requests]

    def keep(scored: Sequence[tuple[int, list[ChoiceScore]]]) -> None:
        for index, values in scored:
            scores[index] = values
        if on_scored is not None:
            on_scored(scored)

    with eval_mode(model):
        if packs(model, requests, pack_tokens):
            score_packed(model, requests, pack_tokens=pack_tokens, track=track, on_scored=keep)
        else:
            score_plain(model, requests, batch_tokens=pack_tokens, track=track, on_scored=keep)
    return scores


def _check_lengths(model: PreTrainedModel, requests: Sequence[ChoiceRequest]) -> None:
    """Raise an error for requests without tokens, or with more than fit into the context."""
    limit = context_length(model)
    for number, request in enumerate(requests, start=1):
        if not request.context or not request.continuations or not all(request.continuations):
            raise SettingError(f"request {number} of {len(requests)} has a context or continuation without tokens")
        # The last token is only predicted.
        if limit is not None and request.longest - 1 > limit:
            raise SettingError(
                f"request {number} of {len(requests)} is {request.longest} tokens long with its longest continuation, "
                f"but the context of the model is {limit} tokens; shorten it"
            )
