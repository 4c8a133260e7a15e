"""Verification: whether a deployment of an edit computes what the hooks compute, and whether it edits at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sealign.edits.attach import apply_edit
from sealign.edits.intervention import Intervention
from sealign.models.eval_mode import eval_mode
from sealign.models.generation import generate_ids
from sealign.models.structure import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = (
    "The library opens at nine in the morning, and by ten every seat by the window is taken.",
    "What happens if you swallow chewing gum?",
    "To repair a puncture, first find the hole: hold the tube under water and look for bubbles.",
    "Write one sentence about the sea.",
)
"""Default prompts."""


@dataclass(frozen=True)
class Outputs:
    """Outputs of a model for some prompts.

    Attributes:
        log_probabilities: Log-probabilities of the tokens of each prompt, from the second token on, in nats.
        completions: Token ids of the greedy completion of each prompt.
    """

    log_probabilities: list[NDArray[np.float64]]
    completions: list[list[int]]


@dataclass(frozen=True)
class Agreement:
    """Agreement of a deployment with the hooks.

    Attributes:
        name: Name of the deployment.
        largest: Largest difference of a token's log-probability, in nats.
        mean: Mean absolute difference of the log-probabilities, in nats.
        effect: Mean absolute difference between the edited and the base model under hooks, in nats.
        applied: Fraction of the edit that the deployment applies: the least-squares coefficient of the deployment's
            change of the log-probabilities on the change under hooks. 1 is the whole edit, 0 is no edit.
        same_tokens: Fraction of the greedy tokens that precede the first difference in their completion, in [0, 1].
        tolerance: Maximum accepted value of ``largest``, in nats.
    """

    name: str
    largest: float
    mean: float
    effect: float
    applied: float
    same_tokens: float
    tolerance: float

    @property
    def has_effect(self) -> bool:
        """Whether the edit changes the log-probabilities by more than the tolerance, so that it can be seen."""
        return self.effect > self.tolerance

    @property
    def fired(self) -> bool:
        """Whether the deployment applies the edit: it is closer to the edited model than to the base model."""
        return self.applied > 0.5

    @property
    def passed(self) -> bool:
        """Whether the deployment applies the edit and agrees with the hooks within the tolerance."""
        return self.fired and self.largest <= self.tolerance


@torch.no_grad()
def model_outputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = PROMPTS,
    *,
    max_new_tokens: int = 16,
) -> Outputs:
    """Return the outputs of a transformers model, including any edit or adapter that is attached to it.

    Args:
        model: The model.
        tokenizer: Tokenizer of the model.
        prompts: Prompts of at least 2 tokens each.
        max_new_tokens: Number of tokens to generate after each prompt.
    """
    logs, completions = [], []
    with eval_mode(model):
        for prompt in prompts:
            ids = list(tokenizer.encode(prompt))
            tensor = torch.tensor([ids], device=input_device(model))
            output: Any = model(input_ids=tensor, use_cache=False)
            scores = torch.log_softmax(output.logits[0, :-1].double(), dim=-1)
            logs.append(scores.gather(1, tensor[0, 1:, None])[:, 0].cpu().numpy())
            completion = generate_ids(model, tokenizer, [ids], max_new_tokens)[0].tolist()
            completions.append([token for token in completion if token >= 0])
    return Outputs(logs, completions)


def reference_outputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edit: Intervention,
    prompts: Sequence[str] = PROMPTS,
    *,
    max_new_tokens: int = 16,
    ignore_mismatch: bool = False,
) -> tuple[Outputs, Outputs]:
    """Return the outputs of the base model, and of the base model with the edit attached by hooks.

    Args:
        model: The base model.
        tokenizer: Tokenizer of the model.
        edit: The edit, or another intervention.
        prompts: Prompts of at least 2 tokens each.
        max_new_tokens: Number of tokens to generate after each prompt.
        ignore_mismatch: Whether to accept a model with another fingerprint.

    Raises:
        FingerprintError: The model is not the one that the edit was fitted on.
    """
    with apply_edit(model, edit, ignore_mismatch=ignore_mismatch) as handle:
        with handle.switched(False):
            base = model_outputs(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
        return base, model_outputs(model, tokenizer, prompts, max_new_tokens=max_new_tokens)


def compare_outputs(name: str, base: Outputs, edited: Outputs, deployed: Outputs, *, tolerance: float) -> Agreement:
    """Return the agreement of a deployment with the hooks.

    Args:
        name: Name of the deployment.
        base: Outputs of the base model.
        edited: Outputs of the edited model under hooks.
        deployed: Outputs of the deployment.
        tolerance: Largest accepted difference of a log-probability, in nats.

    Example:
        >>> plain, edited = Outputs([np.zeros(3)], [[1, 2]]), Outputs([np.ones(3)], [[1, 3]])
        >>> compare_outputs("copy", plain, edited, edited, tolerance=1e-3).passed
        True
        >>> compare_outputs("no edit", plain, edited, plain, tolerance=1e-3).fired
        False
    """
    plain, reference, found = (np.concatenate(outputs.log_probabilities) for outputs in (base, edited, deployed))
    gaps = np.abs(found - reference)
    change = reference - plain
    energy = float(change @ change)
    return Agreement(
        name=name,
        largest=float(gaps.max()),
        mean=float(gaps.mean()),
        effect=float(np.abs(change).mean()),
        applied=float((found - plain) @ change) / energy if energy else 0.0,
        same_tokens=_same_tokens(edited.completions, deployed.completions),
        tolerance=tolerance,
    )


def _same_tokens(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Return the fraction of tokens that precede the first difference in their pair of completions."""
    same = total = 0
    for one, other in zip(ours, theirs, strict=True):
        length = max(len(one), len(other))
        total += length
        pairs = zip(one, other, strict=False)
        same += next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    return same / total if total else 1.0
