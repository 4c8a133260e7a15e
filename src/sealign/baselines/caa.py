"""CAA, contrastive activation addition: a mean difference added to the residual stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from sealign.activations import collect_activations
from sealign.baselines.method import Attached, Method, make_record, settings_of
from sealign.baselines.steering import adder, change_output
from sealign.demonstrations import Demonstration
from sealign.errors import SettingError
from sealign.progress import Track, no_progress
from sealign.sites import resolve_sites, text_config, unwrap_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class CAAConfig:
    """Settings of CAA.

    Attributes:
        layer: whose output is steered; None is 13/32 of the depth, the layer that the paper finds best for Llama 2 7B.
        multiplier: of the vector; negative ones steer the other way.
        seed: unused, since nothing is random; every method takes one.

    Raises:
        SettingError: the multiplier is not finite.

    Example:
        >>> CAAConfig(multiplier=2.0).multiplier
        2.0
    """

    layer: int | None = None
    multiplier: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not abs(self.multiplier) < float("inf"):
            raise SettingError(f"multiplier is {self.multiplier}, but it must be finite; try 1")


@dataclass(frozen=True, eq=False)
class CAA(Method):
    """Steering by the mean difference of activations.

    x' = x + c v at the output of one decoder layer, with v the mean over demonstrations of h+ - h-, read at the last
    token of prompt and completion (Rimsky et al. 2024, arXiv 2312.06681, section 3). The paper adds v after the user's
    prompt only; here, as in the libraries that serve such vectors, it is added at every token.
    """

    name: ClassVar[str] = "caa"

    @classmethod
    def fit(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        demonstrations: Sequence[Demonstration],
        config: CAAConfig = CAAConfig(),
        *,
        checkpoint_dir: Path | None = None,
        track: Track = no_progress,
    ) -> Self:
        """Learn the vector from demonstrations."""
        started = time.perf_counter()
        depth = text_config(unwrap_model(model)).num_hidden_layers
        layer = round(13 / 32 * depth) if config.layer is None else config.layer
        found = collect_activations(
            model,
            tokenizer,
            demonstrations,
            site="residual",
            layers=[layer],
            checkpoint_dir=checkpoint_dir,
            track=track,
        )
        vector = (found.positive[layer].double() - found.negative[layer].double()).mean(0).float()
        tensors = {"vector": vector}
        settings = settings_of(config) | {"layer": layer}
        seconds = time.perf_counter() - started
        return cls(make_record(cls.name, settings, model, tokenizer, demonstrations, tensors, seconds), tensors)

    def put_on(self, model: object, attached: Attached) -> None:
        """Add the vector to the output of its layer."""
        (site,) = resolve_sites(model, "residual", [self.settings["layer"]])  # type: ignore[arg-type]
        vector = self.settings["multiplier"] * self.tensors["vector"]
        change_output(site.module, adder(vector), attached)

    def randomized(self, seed: int) -> CAA:
        """Return a random vector of the same length in place of the learnt one."""
        generator = torch.Generator().manual_seed(seed)
        vector = self.tensors["vector"]
        random = torch.randn(vector.shape, generator=generator)
        return self.with_tensors({"vector": random * (vector.norm() / random.norm())})

    def reversed(self) -> CAA:
        """Return the vector from positive to negative."""
        return self.with_tensors({"vector": -self.tensors["vector"]})
