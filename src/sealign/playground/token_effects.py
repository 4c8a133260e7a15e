"""What an edit does to each token of an answer: the divergence from the base model, and the likeliest alternatives."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.edits.intervention import Intervention
from sealign.models.eval_mode import eval_mode
from sealign.models.structure import input_device, unwrap_model
from sealign.playground.answering import attached

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_POSITIONS = 32
"""Number of positions whose log-probabilities are held in float64 at once."""


@dataclass(frozen=True)
class Alternative:
    """A token that might have come, and its log-probability in nats.

    Attributes:
        token: Id of the token.
        log_probability: Logarithm of its probability; ``-inf`` if the model excludes it.
    """

    token: int
    log_probability: float


@dataclass(frozen=True)
class TokenEffect:
    """What an edit does at one token of an answer, given the same tokens before it.

    Attributes:
        token: Id of the token.
        divergence: KL(base || edited) of the next token at this position, in nats; infinite if the edited model
            excludes a token that the base model does not, and NaN if a logit is.
        base, edited: Log-probability of the token under each model, in nats.
        base_alternatives, edited_alternatives: The likeliest tokens under each model, the likeliest first.
    """

    token: int
    divergence: float
    base: float
    edited: float
    base_alternatives: tuple[Alternative, ...]
    edited_alternatives: tuple[Alternative, ...]


@torch.no_grad()
def token_effects(
    model: PreTrainedModel,
    prompt: Sequence[int],
    answer: Sequence[int],
    edit: Intervention | None,
    *,
    alternatives: int = 5,
) -> list[TokenEffect]:
    """Score an answer under the base model and the edited model, and return what the edit does at each token.

    At token t of the answer, with p the distribution of the base model and q that of the edited model, both given the
    prompt and the tokens before t:

        KL(p || q) = sum_v p(v) (log p(v) - log q(v))

    Args:
        model: The base model.
        prompt: Token ids that the model has read before the answer; at least 1.
        answer: Token ids of the answer; at least 1.
        edit: The edit, which was checked against the model; None if none is switched on.
        alternatives: Number of alternatives.
    """
    with eval_mode(model):
        base = _logits(model, prompt, answer)
        with attached(model, edit):
            edited = _logits(model, prompt, answer)
    effects: list[TokenEffect] = []
    for first in range(0, len(answer), _POSITIONS):
        part = slice(first, first + _POSITIONS)
        effects += _effects(base[part], edited[part], answer[part], alternatives)
    return effects


def _logits(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> Float[Tensor, "t v"]:
    """Return the logits from which each token of the answer was chosen."""
    ids = torch.tensor([[*prompt, *answer[:-1]]], device=input_device(model))
    kept = {}
    if "logits_to_keep" in inspect.signature(unwrap_model(model).forward).parameters:
        kept["logits_to_keep"] = len(answer)
    logits: Tensor = model(input_ids=ids, use_cache=False, **kept).logits
    return logits[0, -len(answer) :]


def _effects(
    base_logits: Float[Tensor, "t v"], edited_logits: Float[Tensor, "t v"], answer: Sequence[int], count: int
) -> list[TokenEffect]:
    base, edited = (torch.log_softmax(logits.double(), dim=-1) for logits in (base_logits, edited_logits))
    # A token that the base model excludes has log p = -inf, and adds nothing.
    terms = torch.where(base.isneginf(), 0.0, base.exp() * (base - edited))
    divergences = terms.sum(-1).clamp(min=0.0).tolist()
    likeliest = [found.topk(min(count, found.shape[-1]), dim=-1) for found in (base, edited)]
    effects = []
    for row, (token, divergence) in enumerate(zip(answer, divergences, strict=True)):
        options = [
            tuple(map(Alternative, found.indices[row].tolist(), found.values[row].tolist())) for found in likeliest
        ]
        effects.append(
            TokenEffect(token, divergence, float(base[row, token]), float(edited[row, token]), options[0], options[1])
        )
    return effects
