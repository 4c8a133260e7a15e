"""Best-of-N: sample several answers and return the most likely one."""

from __future__ import annotations

import copy
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Bool, Int
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
        temperature: Sampling temperature. Must be above 0.
        top_p: Nucleus sampling threshold, in (0, 1].
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


class _Generate:
    """The ``generate`` of a model while the method is attached; a copy of the model has one with a detached handle."""

    def __init__(self, base: Any, generate: Any, method: BestOfNSampling, handle: EditHandle) -> None:
        self._base, self._generate, self._method, self._handle = base, generate, method, handle

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._handle.enabled:
            return self._method.choose(self._base, self._generate, args, kwargs)
        return self._generate(*args, **kwargs)


class BestOfNSampling(RecordedIntervention):
    """Sampling of n answers, of which the one with the highest mean log-probability per token is returned.

    The rule is argmax over answers y of sum_t log p(y_t | prompt, y_<t) / |y|, with p the distribution at temperature 1
    of the model that sampled them, edits included, and y ending with its end token. It uses no reference answer and no
    judge. It acts on generation only and leaves the log-likelihoods of given answers unchanged.

    The answers are sampled one after another. ``num_return_sequences`` would sample them together, but it needs n times
    the memory of the cache, and takes neither a prefilled cache nor stopping criteria made for the rows of the batch.
    """

    changes_scores: ClassVar[bool] = False

    def install(self, model: Any, handle: EditHandle) -> None:
        """Replace the model's ``generate`` by one that samples n answers and returns the best."""
        base = unwrap_model(model)
        before = vars(base).get("generate")
        base.generate = _Generate(base, base.generate, self, handle)
        handle.stack.callback(_restore, base, before)

    def choose(self, base: Any, generate: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the most likely of n sampled answers for each row, in the form that ``generate`` returns.

        Args:
            base: The model.
            generate: Its own ``generate``.
            args, kwargs: Arguments of the call.
        """
        sampling = {
            "do_sample": True,
            "temperature": self.settings["temperature"],
            "top_p": self.settings["top_p"],
            "top_k": 0,
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        sequences, means = [], []
        ends, pad = _special_tokens(base, kwargs)
        prompt = (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape[1]
        with torch.random.fork_rng():
            torch.manual_seed(self.settings["seed"])
            for _ in range(self.settings["n"]):
                found = generate(*args, **(kwargs | sampling | _fresh(kwargs)))
                new = found.sequences[:, prompt:]
                logs = torch.stack([torch.log_softmax(step.float(), -1) for step in found.logits], dim=1)
                padding = _after_end(new, ends, pad)
                chosen = logs.gather(2, new[..., None])[..., 0].masked_fill(padding, 0.0)
                means.append(chosen.sum(1) / (~padding).sum(1).clamp_min(1))
                sequences.append(found.sequences)
        best = torch.stack(means).argmax(0)
        width = max(found.shape[1] for found in sequences)
        padded = [torch.nn.functional.pad(found, (0, width - found.shape[1]), value=pad) for found in sequences]
        return torch.stack([padded[int(index)][row] for row, index in enumerate(best)])


def _special_tokens(base: Any, kwargs: dict[str, Any]) -> tuple[list[int], int]:
    """Return the end tokens and the pad token of a call of ``generate``, as transformers decides them."""
    config = kwargs.get("generation_config") or base.generation_config
    ends = kwargs.get("eos_token_id", config.eos_token_id)
    pad = kwargs.get("pad_token_id", config.pad_token_id)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return ends, int(pad) if pad is not None else int(ends[0]) if ends else 0


def _after_end(new: Int[Tensor, "b t"], ends: list[int], pad: int) -> Bool[Tensor, "b t"]:
    """Return a mask of the padding after each answer; its end token is part of the answer.

    Without end tokens, transformers pads nothing. With them, it also pads rows that another stopping criterion ended.
    """
    if not ends:
        return torch.zeros_like(new, dtype=torch.bool)
    stops = torch.isin(new, new.new_tensor(ends)).long()
    after = stops.cumsum(1) - stops > 0
    return after if pad in ends else after | (new == pad).flip(1).long().cumprod(1).flip(1).bool()


def _fresh(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return copies of the arguments that a call of ``generate`` modifies.

    These are the cache, and the lists in which stopping criteria note which rows are finished.
    """
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
"""Sampling of several answers, of which the most likely is returned."""
