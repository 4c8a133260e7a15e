"""CAA, contrastive activation addition: a mean difference added to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sealign.errors import SettingError
from sealign.fitting.collecting import collect_activations
from sealign.methods.method import Attached, FitContext, Method
from sealign.methods.steering import adder, change_output
from sealign.models.sites import resolve_sites
from sealign.models.structure import text_config, unwrap_model


@dataclass(frozen=True, kw_only=True)
class CAAConfig:
    """Settings of CAA.

    Attributes:
        layer: whose output is steered; None is 13/32 of the depth, the layer that the paper finds best for Llama 2 7B.
        multiplier: of the vector; negative ones steer the other way.

    Raises:
        SettingError: the multiplier is not finite.

    Example:
        >>> CAAConfig(multiplier=2.0).multiplier
        2.0
    """

    layer: int | None = None
    multiplier: float = 1.0

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
    def learn(cls, lesson: FitContext, config: CAAConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Learn the vector from demonstrations."""
        depth = text_config(unwrap_model(lesson.model)).num_hidden_layers
        layer = round(13 / 32 * depth) if config.layer is None else config.layer
        found = collect_activations(
            lesson.model,
            lesson.tokenizer,
            lesson.demonstrations,
            site="residual",
            layers=[layer],
            checkpoint_dir=lesson.checkpoint_dir,
            track=lesson.track,
        )
        vector = (found.positive[layer].double() - found.negative[layer].double()).mean(0).float()
        return {"layer": layer}, {"vector": vector}

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
