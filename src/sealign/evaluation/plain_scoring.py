"""Scoring of each continuation in a sequence of its own, which is right for every causal decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sealign.edits.attach import allows_batches
from sealign.evaluation.choices import ChoiceRequest, ChoiceScore, OnScored, choice_scores
from sealign.models.batching import pad_right
from sealign.models.shared_layers import run_shared
from sealign.models.structure import input_device, logits_kept
from sealign.progress import Track

Continuation = tuple[int, int]
"""Index of a request, and index of one of its continuations."""


def score_plain(
    model: Any, requests: Sequence[ChoiceRequest], *, batch_tokens: int, track: Track, on_scored: OnScored
) -> None:
    """Score requests without packing; see ``score_choices`` for the arguments.

    Sequences are padded on the right, where no token of a causal model sees the padding.
    """
    waiting = [len(request.continuations) for request in requests]
    scores: list[dict[int, ChoiceScore]] = [{} for _ in requests]
    batches = list(_batches(requests, batch_tokens if allows_batches(model) else 0))
    for batch in track(batches, "Scoring", len(batches)):
        found = score_sequences(model, [(requests[i].context, requests[i].continuations[j]) for i, j in batch])
        finished = []
        for (index, branch), score in zip(batch, found, strict=True):
            scores[index][branch] = score
            if len(scores[index]) == waiting[index]:
                finished.append((index, [scores[index][branch] for branch in range(waiting[index])]))
        if finished:
            on_scored(finished)


def _batches(requests: Sequence[ChoiceRequest], tokens: int) -> Iterator[list[Continuation]]:
    """Yield batches of at most so many tokens with their padding, the longest sequences first."""
    lengths = {
        (index, branch): len(request.context) + len(continuation)
        for index, request in enumerate(requests)
        for branch, continuation in enumerate(request.continuations)
    }
    waiting = sorted(lengths, key=lengths.__getitem__, reverse=True)
    while waiting:
        count = max(1, tokens // lengths[waiting[0]])
        yield waiting[:count]
        waiting = waiting[count:]


def score_sequences(model: Any, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[ChoiceScore]:
    """Return the score of the continuation of each (context, continuation), all in one batch."""
    ids, mask = pad_right([[*context, *tokens[:-1]] for context, tokens in sequences], 0, input_device(model))
    skipped = min(len(context) for context, _ in sequences) - 1  # positions that predict no continuation
    logits = run_shared(model, input_ids=ids, attention_mask=mask, **logits_kept(model, ids.shape[1] - skipped)).logits
    skipped = ids.shape[1] - logits.shape[1]
    where = [
        (row, len(context) - 1 - skipped + step)
        for row, (context, tokens) in enumerate(sequences)
        for step in range(len(tokens))
    ]
    rows, columns = map(list, zip(*where, strict=True))
    return choice_scores(logits[rows, columns], range(len(where)), [tokens for _, tokens in sequences])
