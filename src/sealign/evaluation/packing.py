"""The decision whether the sequences of a model may be packed, by comparison with plain scores."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch

from sealign.edits.attach import allows_batches, edits_tokens
from sealign.errors import SealignWarning, first_sentence
from sealign.evaluation.choices import ChoiceRequest
from sealign.evaluation.packed_scoring import IndexedRequest, can_be_packed, pack_rows, run_prefix, score_row
from sealign.evaluation.plain_scoring import score_sequences
from sealign.models.rounding import tolerance
from sealign.models.shared_prefix import Prefix, common_prefix
from sealign.models.structure import unwrap_model

_proved: WeakKeyDictionary[Any, dict[tuple[int, ...], int]] = WeakKeyDictionary()
"""Length of the longest row that was proved right, by model and by the hooks on it."""

_refused: WeakSet[Any] = WeakSet()
"""Models whose packed scores are wrong."""


@torch.no_grad()
def packs(model: Any, requests: Sequence[ChoiceRequest], pack_tokens: int) -> bool:
    """Return whether requests may be packed; warn once for each model whose packed scores are wrong.

    Structure does not decide: GPT-Neo masks its local layers by distance in the row, for example. So before rows of a
    new length, or with new hooks on the model, the row of the longest request and the longest row are scored packed,
    and the continuations in them that are farthest from what they attend to are also scored plain.

    Args:
        model: The model, in evaluation mode, with the edits that are attached to it.
        requests: Requests that are to be scored.
        pack_tokens: Maximum number of tokens in a packed row.
    """
    base = unwrap_model(model)
    if base in _refused or not allows_batches(model) or not can_be_packed(base):
        return False
    rows = list(pack_rows(requests, len(common_prefix([request.context for request in requests])), pack_tokens))
    lengths = [_packed_length(row) for row in rows]
    proved, hooks = _proved.setdefault(base, {}), _hooks(base)
    if max(lengths, default=0) <= proved.get(hooks, 0):
        return True
    reason = _disagreement(model, requests, [rows[index] for index in sorted({0, lengths.index(max(lengths))})])
    if reason:
        _refused.add(base)
        message = f"packed scores of {type(base).__name__} {reason}; scoring without packing, slower"
        warnings.warn(message, SealignWarning, stacklevel=2)
        return False
    proved[hooks] = max(lengths)
    return True


def _packed_length(row: Sequence[IndexedRequest]) -> int:
    """Return the number of tokens of a row; 0 for a single continuation, which is not packed."""
    single = len(row) == 1 and len(row[0][1].continuations) == 1
    return 0 if single else sum(request.length for _, request in row)


def _hooks(model: Any) -> tuple[int, ...]:
    """Return the ids of all forward hooks of a model, each of which torch uses once.

    Those of edits are left out: they change each token by itself, so that its neighbours in a row do not matter.
    """
    hooks = [
        item
        for module in model.modules()
        for own in (module._forward_hooks, module._forward_pre_hooks)
        for item in own.items()
    ]
    return tuple(key for key, hook in hooks if not edits_tokens(hook))


def _disagreement(model: Any, requests: Sequence[ChoiceRequest], rows: Sequence[Sequence[IndexedRequest]]) -> str:
    """Return how the packed scores of rows disagree with plain ones; empty if they agree."""
    try:
        prefix = run_prefix(model, requests)
        worst = max(_difference(model, row, prefix) for row in rows)
    except Exception as error:  # whatever a model raises on packed rows, it is scored without them
        return f"cannot be computed ({first_sentence(error)})"
    limit = tolerance(model.dtype)
    return f"differ from plain ones by {worst:.2g} nats, more than {limit:.2g}" if worst > limit else ""


def _difference(model: Any, row: Sequence[IndexedRequest], prefix: Prefix) -> float:
    """Return the largest difference of the last scores of the first and the last request of a row from plain scores."""
    packed = score_row(model, row, prefix)
    differences = []
    for index in {0, len(row) - 1}:
        request, score = row[index][1], packed[index][1][-1]
        (plain,) = score_sequences(model, [(request.context, request.continuations[-1])])
        found = torch.tensor([score.log_probability, plain.log_probability])
        same = torch.allclose(found[0], found[1], equal_nan=True)
        gap = abs(score.log_probability - plain.log_probability) / math.sqrt(len(request.continuations[-1]))
        differences.append(0.0 if same else gap if math.isfinite(gap) else math.inf)
    return max(differences)
