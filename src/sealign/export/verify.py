"""Whether a deployment computes what the hooks compute, and whether it edits at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sealign.edits.attach import apply_edit
from sealign.edits.edit import Edit
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
"""What is run where no other prompts are given."""


@dataclass(frozen=True)
class Outputs:
    """What a model makes of prompts.

    Attributes:
        log_probabilities: of each prompt's own tokens, from the second on, one array a prompt.
        completions: token ids of the greedy completion of each prompt.
    """

    log_probabilities: list[NDArray[np.float64]]
    completions: list[list[int]]


@dataclass(frozen=True)
class Agreement:
    """How far a deployment is from the hooks.

    Attributes:
        name: of the deployment.
        largest: largest difference of a token's log-probability, in nats.
        mean: mean difference, in nats.
        effect: mean difference between the edited and the base model under hooks, in nats.
        share: how much of the edit the deployment has: the least-squares coefficient of its change, from the base
            model under hooks, on the edit's; 1 is all of it, 0 none.
        same_tokens: share of greedy tokens that agree, up to the first that does not, in [0, 1].
        tolerance: of ``largest``.
    """

    name: str
    largest: float
    mean: float
    effect: float
    share: float
    same_tokens: float
    tolerance: float

    @property
    def fired(self) -> bool:
        """Whether the deployment edits: it is nearer, by squared distance, to the edited than to the base model."""
        return self.share > 0.5

    @property
    def passed(self) -> bool:
        """Whether the deployment edits, and as the hooks do within the tolerance."""
        return self.fired and self.largest <= self.tolerance


@torch.no_grad()
def model_outputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = PROMPTS,
    *,
    max_new_tokens: int = 16,
) -> Outputs:
    """Return what a transformers model makes of prompts, with whatever edit or adapter is on it.

    Args:
        model: the model.
        tokenizer: its own.
        prompts: each of at least 2 tokens.
        max_new_tokens: length of the completions.
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
    edit: Edit,
    prompts: Sequence[str] = PROMPTS,
    *,
    max_new_tokens: int = 16,
) -> tuple[Outputs, Outputs]:
    """Return what the base model and the edited model under hooks make of prompts."""
    base = model_outputs(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    with apply_edit(model, edit):
        return base, model_outputs(model, tokenizer, prompts, max_new_tokens=max_new_tokens)


def compare_outputs(name: str, base: Outputs, edited: Outputs, deployed: Outputs, *, tolerance: float) -> Agreement:
    """Return how far a deployment is from the hooks.

    Args:
        name: of the deployment.
        base: of the base model.
        edited: of the edited model under hooks.
        deployed: of the deployment.
        tolerance: of the largest difference of a log-probability, in nats.

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
        share=float((found - plain) @ change) / energy if energy else 0.0,
        same_tokens=_same_share(edited.completions, deployed.completions),
        tolerance=tolerance,
    )


def _same_share(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """The share of tokens before the first difference of each pair of completions."""
    same = total = 0
    for one, other in zip(ours, theirs, strict=True):
        length = max(len(one), len(other))
        total += length
        pairs = zip(one, other, strict=False)
        same += next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    return same / total if total else 1.0


@dataclass(frozen=True)
class Deviation:
    """How far an edit without its rescaling is from the edit itself, over the tokens of texts.

    Attributes:
        mean_divergence: mean KL(edit || export), in nats.
        largest_divergence: the largest.
        same_top: share of tokens at which both predict the same token.
    """

    mean_divergence: float
    largest_divergence: float
    same_top: float


@torch.no_grad()
def measure_deviation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, edit: Edit, texts: Sequence[str]
) -> Deviation:
    """Return how far an edit without its rescaling is from the edit itself.

    Args:
        model: the base model.
        tokenizer: its own.
        edit: a rescaled edit.
        texts: plain texts, each of at least 1 token.
    """
    divergences, same = [], []
    with eval_mode(model):
        for text in texts:
            ids = torch.tensor([list(tokenizer.encode(text))], device=input_device(model))
            logs = []
            for arm in (edit, edit.with_settings(normalization="none")):
                with apply_edit(model, arm):
                    output: Any = model(input_ids=ids, use_cache=False)
                logs.append(torch.log_softmax(output.logits[0].double(), dim=-1))
            divergences.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1).cpu().numpy())
            same.append((logs[0].argmax(-1) == logs[1].argmax(-1)).cpu().numpy())
    joined = np.concatenate(divergences)
    return Deviation(float(joined.mean()), float(joined.max()), float(np.concatenate(same).mean()))
