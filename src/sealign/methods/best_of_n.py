"""Best-of-N: several sampled answers, of which the most likely is kept."""

from __future__ import annotations

import copy
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sealign.configuration import Config
from sealign.edits.handle import EditHandle
from sealign.methods.method import FitContext, Method, RecordedIntervention, without_demonstrations
from sealign.models.structure import unwrap_model


class BestOfNConfig(Config):
    """Settings of Best-of-N.

    Attributes:
        n: Number of answers to sample. Must be at least 1.
        temperature: Temperature of the sampling. Must be above 0.
        top_p: Share in (0, 1] of the probability mass to sample from.
        seed: Seed of the sampling.

    Raises:
        SettingError: A value is out of range.

    Example:
        >>> BestOfNConfig(n=4).temperature
        0.7
    """

    n: Annotated[int, Field(ge=1)] = 8
    temperature: Annotated[float, Field(gt=0, examples=[0.7])] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1, examples=[0.95])] = 0.95
    seed: int = 0


class BestOfNSampling(RecordedIntervention):
    """Of n sampled answers, the one with the highest mean log-probability a token under the model that sampled them.

    The rule: argmax over answers y of sum_t log p(y_t | prompt, y_<t) / |y|, with p at temperature 1 and y ending
    with its end token. No reference answer and no judge is looked at. It acts on generation alone, on whatever else is
    on the model; log-likelihoods of given answers are those without it.
    """

    changes_scores: ClassVar[bool] = False

    def install(self, model: Any, handle: EditHandle) -> None:
        """Replace the model's ``generate`` by sampling and choosing."""
        base = unwrap_model(model)
        generate = base.generate

        def best(*args: Any, **kwargs: Any) -> Any:
            return self._best(generate, args, kwargs) if handle.enabled else generate(*args, **kwargs)

        before = vars(base).get("generate")
        base.generate = best
        handle.stack.callback(_restore, base, before)

    def _best(self, generate: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Sample n times and return, row by row, the likeliest, as ``generate`` would."""
        sampling = {
            "do_sample": True,
            "temperature": self.settings["temperature"],
            "top_p": self.settings["top_p"],
            "top_k": 0,
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        sequences, means = [], []
        prompt = (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape[1]
        with torch.random.fork_rng():
            torch.manual_seed(self.settings["seed"])
            for _ in range(self.settings["n"]):
                found = generate(*args, **(kwargs | sampling | _fresh(kwargs)))
                new = found.sequences[:, prompt:]
                logs = torch.stack([torch.log_softmax(step.float(), -1) for step in found.logits], dim=1)
                ended = _after_end(new, kwargs.get("pad_token_id"))
                chosen = logs.gather(2, new[..., None])[..., 0].masked_fill(ended, 0.0)
                means.append(chosen.sum(1) / (~ended).sum(1).clamp_min(1))
                sequences.append(found.sequences)
        best = torch.stack(means).argmax(0)
        width = max(found.shape[1] for found in sequences)
        pad = int(kwargs.get("pad_token_id") or 0)
        padded = [torch.nn.functional.pad(found, (0, width - found.shape[1]), value=pad) for found in sequences]
        return torch.stack([padded[int(index)][row] for row, index in enumerate(best)])


def _after_end(new: Tensor, pad: int | None) -> Tensor:
    """Which tokens are padding behind an answer: all of the last run of padding but its first, which may be the end."""
    if pad is None:
        return torch.zeros_like(new, dtype=torch.bool)
    tail = (new == pad).flip(1).cumprod(1).flip(1).bool()
    first = tail & ~torch.nn.functional.pad(tail, (1, 0))[:, :-1]
    return tail & ~first


def _fresh(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a call of ``generate`` changes, as it was given: the cache, and in stopping criteria which rows are done."""
    changed = {"past_key_values": copy.deepcopy(kwargs.get("past_key_values"))}
    criteria = kwargs.get("stopping_criteria")
    if criteria is None:
        return changed
    fresh = type(criteria)()
    for criterion in criteria:
        twin = copy.copy(criterion)
        vars(twin).update({name: list(value) for name, value in vars(twin).items() if isinstance(value, list)})
        fresh.append(twin)
    return changed | {"stopping_criteria": fresh}


def _restore(base: Any, before: Any) -> None:
    if before is None:
        vars(base).pop("generate", None)
    else:
        base.generate = before


def _fit(context: FitContext, config: BestOfNConfig) -> BestOfNSampling:
    return BestOfNSampling.build(without_demonstrations(context), BEST_OF_N.name, config)


BEST_OF_N = Method("best_of_n", BestOfNConfig, BestOfNSampling, _fit, needs_demonstrations=lambda _: False)
"""Sampling of several answers, of which the likeliest is returned."""
