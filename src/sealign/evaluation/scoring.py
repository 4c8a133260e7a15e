"""Log-likelihoods of continuations; a prefix common to several of them is computed once."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sealign.models.eval_mode import eval_mode
from sealign.models.shared_prefix import Prefix, common_prefix
from sealign.models.structure import input_device, text_config, unwrap_model
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACK_TOKENS = 512
"""Number of tokens in a packed row: longer rows waste attention on masked tokens, shorter ones leave cores idle."""


@dataclass(frozen=True)
class ChoiceRequest:
    """A context and its continuations to be scored.

    Attributes:
        context: Token ids of the context, at least 1.
        continuations: Token ids of each continuation, at least 1 each.

    Example:
        >>> ChoiceRequest((1, 2), ((3,), (4, 5))).length
        3
    """

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Number of tokens to run; the last one of each continuation is only predicted."""
        return len(self.context) + sum(len(tokens) - 1 for tokens in self.continuations)


class ChoiceScore(NamedTuple):
    """Score of one continuation.

    Attributes:
        log_probability: log p(continuation | context) in nats, summed over tokens.
        greedy: Whether greedy decoding would give the continuation.
    """

    log_probability: float
    greedy: bool


def layer_kinds(model: Any) -> set[str]:
    """Return the kinds of attention in a model, such as ``full_attention``.

    A configuration that does not name them has one kind, which depends on whether there is a sliding window.
    """
    config = text_config(unwrap_model(model))
    window = getattr(config, "sliding_window", None)
    return set(getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"])


def supports_packing(model: Any) -> bool:
    """Return whether several sequences can be packed into one row of a model.

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


@torch.no_grad()
def score_choices(
    model: PreTrainedModel,
    requests: Sequence[ChoiceRequest],
    *,
    pack_tokens: int = PACK_TOKENS,
    track: Track = no_progress,
    on_scored: Callable[[Sequence[tuple[int, list[ChoiceScore]]]], None] | None = None,
) -> list[list[ChoiceScore]]:
    """Return log p(continuation | context) of every continuation.

    The common prefix of all contexts runs once, and each context runs once for all its continuations. Several requests
    are packed into one row, in which a token attends to the common prefix, its own context and its own continuation,
    at the positions that it has in a sequence of its own. Logits are computed only where a continuation is predicted.

    Args:
        model: A decoder for which ``supports_packing`` is true; edits that are attached to it must be causal.
        requests: Contexts and continuations.
        pack_tokens: Maximum number of tokens in a packed row; a longer request has a row of its own.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.
        on_scored: Called after each row with (index of the request, its scores) of the requests in the row.

    Returns:
        For each request, the score of each continuation.
    """
    from transformers import DynamicCache

    device = input_device(model)
    prefix_ids = common_prefix([request.context for request in requests])
    order = sorted(range(len(requests)), key=lambda index: requests[index].length, reverse=True)
    scores: list[list[ChoiceScore]] = [[] for _ in requests]
    with eval_mode(model):
        # A cache without the configuration of the model keeps the whole prefix also in layers with a sliding window.
        prefix = Prefix.run(model, prefix_ids, device, logits_to_keep=1, past_key_values=DynamicCache())
        start = len(prefix.ids)
        rows = list(_pack([(index, requests[index]) for index in order], start, pack_tokens))
        for row in track(rows, "Scoring", len(rows)):
            scored = _score_row(model, row, prefix, device)
            for index, values in scored:
                scores[index] = values
            if on_scored is not None:
                on_scored(scored)
    return scores


def _pack(
    requests: Sequence[tuple[int, ChoiceRequest]], start: int, capacity: int
) -> Iterator[list[tuple[int, ChoiceRequest]]]:
    """Yield groups of requests to pack into one row: the longest first, with the longest ones that still fit."""
    waiting = list(requests)
    while waiting:
        row: list[tuple[int, ChoiceRequest]] = []
        rest: list[tuple[int, ChoiceRequest]] = []
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


def _score_row(
    model: Any, requests: Sequence[tuple[int, ChoiceRequest]], prefix: Prefix, device: torch.device
) -> list[tuple[int, list[ChoiceScore]]]:
    start = len(prefix.ids)
    row = _Row([], [], [], [])
    predicted: list[int] = []  # indices of the tokens whose logits are needed
    targets: list[int] = []
    for number, (_, request) in enumerate(requests):
        context = request.context[start:]
        last = row.add(context, start, number, -1)
        for branch, tokens in enumerate(request.continuations):
            first = row.add(tokens[:-1], len(request.context), number, branch) - len(tokens) + 2
            predicted += [last, *range(first, first + len(tokens) - 1)]
            targets += tokens
    where = sorted(set(predicted))
    logits = model(
        input_ids=torch.tensor([row.tokens], device=device),
        position_ids=torch.tensor([row.positions], device=device),
        attention_mask=row.masks(start, model, device),
        past_key_values=copy.deepcopy(prefix.cache),
        use_cache=prefix.cache is not None,
        logits_to_keep=torch.tensor(where, device=device),
    ).logits[0]
    logs = torch.log_softmax(logits.float(), dim=-1)
    place = {index: position for position, index in enumerate(where)}
    rows = [place[index] for index in predicted]
    chosen = logs[rows, targets].double().cpu()
    greedy = (logs.argmax(-1)[rows].cpu() == torch.tensor(targets)).cpu()
    lengths = [len(tokens) for _, request in requests for tokens in request.continuations]
    parts = zip(torch.split(chosen, lengths), torch.split(greedy, lengths), strict=True)
    scores = iter([ChoiceScore(float(logs.sum()), bool(hits.all())) for logs, hits in parts])
    return [(index, [next(scores) for _ in request.continuations]) for index, request in requests]
