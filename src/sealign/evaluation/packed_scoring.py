"""Scoring of several sequences in one row, with a mask that keeps them apart."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sealign.evaluation.choices import ChoiceRequest, ChoiceScore, OnScored, choice_scores
from sealign.models.shared_layers import run_shared
from sealign.models.shared_prefix import Prefix, common_prefix
from sealign.models.structure import input_device, text_config, unwrap_model
from sealign.progress import Track

IndexedRequest = tuple[int, ChoiceRequest]
"""A request and its index among all requests of a call."""


def layer_kinds(model: Any) -> set[str]:
    """Return the kinds of attention in a model, such as ``full_attention``.

    A configuration that does not name them has one kind, which depends on whether there is a sliding window.
    """
    config = text_config(unwrap_model(model))
    window = getattr(config, "sliding_window", None)
    return set(getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"])


def can_be_packed(model: Any) -> bool:
    """Return whether the structure of a model allows several sequences in one row; ``packs`` proves it by numbers.

    That needs attention layers only: linear attention and recurrent state ignore the mask, and ALiBi takes distances
    from the row, not from position ids.
    """
    base = unwrap_model(model)
    parameters = inspect.signature(base.forward).parameters
    return (
        layer_kinds(base) <= {"full_attention", "sliding_attention"}
        and {"position_ids", "past_key_values", "logits_to_keep"} <= set(parameters)
        and not getattr(text_config(base), "alibi", False)
    )


def run_prefix(model: Any, requests: Sequence[ChoiceRequest]) -> Prefix:
    """Run the common prefix of the contexts of requests."""
    from transformers import DynamicCache

    ids = common_prefix([request.context for request in requests])
    # A cache without the configuration of the model keeps the whole prefix also in layers with a sliding window.
    return Prefix.run(model, ids, input_device(model), logits_to_keep=1, past_key_values=DynamicCache())


def score_packed(
    model: Any, requests: Sequence[ChoiceRequest], *, pack_tokens: int, track: Track, on_scored: OnScored
) -> None:
    """Score requests in packed rows; see ``score_choices`` for the arguments.

    The common prefix of all contexts runs once, and each context runs once for all its continuations. In a row, a
    token attends to the common prefix, its own context and its own continuation, at the positions that it has in a
    sequence of its own. Logits are computed only where a continuation is predicted.
    """
    prefix = run_prefix(model, requests)
    rows = list(pack_rows(requests, len(prefix.ids), pack_tokens))
    for row in track(rows, "Scoring", len(rows)):
        on_scored(score_row(model, row, prefix))


def pack_rows(requests: Sequence[ChoiceRequest], start: int, capacity: int) -> Iterator[list[IndexedRequest]]:
    """Yield the requests, with their indices, of each row: the longest first, then the longest ones that still fit.

    Args:
        requests: All requests.
        start: Length of the common prefix, which is not part of the rows.
        capacity: Maximum number of tokens in a row; a longer request has a row of its own.
    """
    waiting = sorted(enumerate(requests), key=lambda item: item[1].length, reverse=True)
    while waiting:
        row: list[IndexedRequest] = []
        rest: list[IndexedRequest] = []
        room = capacity
        for item in waiting:
            length = item[1].length - start
            if not row or length <= room:
                row.append(item)
                room -= length
            else:
                rest.append(item)
        waiting = rest
        yield row


@dataclass
class _Row:
    """A packed row under construction; ``request`` and ``branch`` decide which tokens attend to each other."""

    tokens: list[int]
    positions: list[int]
    request: list[int]
    branch: list[int]

    def add(self, tokens: Sequence[int], first_position: int, request: int, branch: int) -> int:
        """Append tokens and return the index of the last one."""
        self.tokens += tokens
        self.positions += range(first_position, first_position + len(tokens))
        self.request += [request] * len(tokens)
        self.branch += [branch] * len(tokens)
        return len(self.tokens) - 1

    def mask(self, start: int, dtype: torch.dtype, window: int | None) -> Tensor:
        """Return the attention mask, (1, 1, t, start + t): 0 for attended tokens, the lowest number for others."""
        request, branch = torch.tensor(self.request), torch.tensor(self.branch)
        length = len(self.tokens)
        sees = torch.ones(length, length, dtype=torch.bool).tril()
        sees &= request[:, None] == request[None, :]
        sees &= (branch[None, :] < 0) | (branch[:, None] == branch[None, :])
        sees = torch.cat([torch.ones(length, start, dtype=torch.bool), sees], dim=1)
        if window is not None:
            positions = torch.tensor(self.positions)
            sees &= positions[:, None] - torch.cat([torch.arange(start), positions])[None, :] < window
        return torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)[None, None]

    def masks(self, start: int, model: Any, device: torch.device) -> Tensor | dict[str, Tensor]:
        """Return the attention mask of the layers of a model, by their kind if there are several."""
        window = getattr(text_config(model), "sliding_window", None)
        found = {
            kind: self.mask(start, model.dtype, window if kind == "sliding_attention" else None).to(device)
            for kind in layer_kinds(model)
        }
        return found if len(found) > 1 else next(iter(found.values()))


def score_row(model: Any, requests: Sequence[IndexedRequest], prefix: Prefix) -> list[tuple[int, list[ChoiceScore]]]:
    """Return the scores of the requests of one packed row.

    Args:
        model: The model.
        requests: Requests of the row, with their indices.
        prefix: The common prefix of the contexts.
    """
    start, device = len(prefix.ids), input_device(model)
    row = _Row([], [], [], [])
    predicted: list[int] = []  # indices of the tokens whose logits are needed
    for number, (_, request) in enumerate(requests):
        context = request.context[start:]
        last = row.add(context, start, number, -1)
        for branch, tokens in enumerate(request.continuations):
            first = row.add(tokens[:-1], len(request.context), number, branch) - len(tokens) + 2
            predicted += [last, *range(first, first + len(tokens) - 1)]
    where = sorted(set(predicted))
    logits = run_shared(
        model,
        prefix=prefix,
        input_ids=torch.tensor([row.tokens], device=device),
        position_ids=torch.tensor([row.positions], device=device),
        attention_mask=row.masks(start, model, device),
        logits_to_keep=torch.tensor(where, device=device),
    ).logits[0]
    place = {index: position for position, index in enumerate(where)}
    continuations = [tokens for _, request in requests for tokens in request.continuations]
    scores = iter(choice_scores(logits, [place[index] for index in predicted], continuations))
    return [(index, [next(scores) for _ in request.continuations]) for index, request in requests]
