"""LEACE: what tells positives from negatives linearly is erased, layer by layer, by ``concept-erasure``."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sealign.errors import SettingError
from sealign.fitting.collecting import collect_activations
from sealign.methods.method import Attached, FitContext, Method
from sealign.methods.steering import change_output
from sealign.models.sites import resolve_sites, select_layers
from sealign.models.structure import text_config, unwrap_model


@dataclass(frozen=True, kw_only=True)
class LEACEConfig:
    """Settings of LEACE.

    Attributes:
        layers: whose outputs are scrubbed, in order; as in ``FitConfig``, without ``signature:L``.

    Raises:
        SettingError: the layers are chosen by signature.

    Example:
        >>> LEACEConfig(layers="last:3").layers
        'last:3'
    """

    layers: str = "last:21/32"

    def __post_init__(self) -> None:
        if self.layers.startswith("signature"):
            raise SettingError("LEACE cannot choose layers by signature; name them, as in last:21/32 or 10,11")


@dataclass(frozen=True, eq=False)
class LEACE(Method):
    """Least-squares concept erasure of the label, positive or negative, from the residual stream.

    x' = x - L R (x - b), the smallest change of x after which no linear classifier does better than the majority
    (Belrose et al. 2023, arXiv 2306.03819, theorem 4.3). Layers are scrubbed one after another, each fitted on what
    the ones before it have left (section 5, concept scrubbing).
    """

    name: ClassVar[str] = "leace"

    @classmethod
    def learn(cls, lesson: FitContext, config: LEACEConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Fit the eraser of each layer on the activations that earlier erasers leave."""
        from concept_erasure import LeaceFitter

        depth = text_config(unwrap_model(lesson.model)).num_hidden_layers
        layers = select_layers(config.layers, depth)
        tensors: dict[str, Tensor] = {}
        attached = Attached()
        with ExitStack() as stack:
            stack.callback(attached.detach)
            for layer in lesson.track(layers, "Erasing", len(layers)):
                # No checkpoints: what a layer gives depends on the erasers before it.
                found = collect_activations(
                    lesson.model, lesson.tokenizer, lesson.demonstrations, site="residual", layers=[layer]
                )
                x = torch.cat([found.positive[layer], found.negative[layer]]).double()
                z = torch.tensor([1.0, 0.0]).repeat_interleave(len(x) // 2).double()
                eraser = LeaceFitter.fit(x, z).eraser
                parts = {"left": eraser.proj_left, "right": eraser.proj_right, "bias": eraser.bias}
                tensors |= {f"layers.{layer}.{name}": part.float() for name, part in parts.items()}
                _erase_at(lesson.model, layer, tensors, attached)
        return {"scrubbed": layers}, tensors

    def put_on(self, model: object, attached: Attached) -> None:
        """Erase at the output of each layer."""
        for layer in self.settings["scrubbed"]:
            _erase_at(model, layer, self.tensors, attached)

    def randomized(self, seed: int) -> LEACE:
        """Return erasers of random directions: each orthogonal, of the same rank, about the same point."""
        generator = torch.Generator().manual_seed(seed)
        tensors = dict(self.tensors)
        for layer in self.settings["scrubbed"]:
            left = tensors[f"layers.{layer}.left"]
            basis = torch.linalg.qr(torch.randn(left.shape, generator=generator)).Q
            tensors |= {f"layers.{layer}.left": basis, f"layers.{layer}.right": basis.T.contiguous()}
        return self.with_tensors(tensors)


def _erase_at(model: Any, layer: int, tensors: dict[str, Tensor] | Any, attached: Attached) -> None:
    from concept_erasure import LeaceEraser

    (site,) = resolve_sites(model, "residual", [layer])
    parts = [tensors[f"layers.{layer}.{name}"] for name in ("left", "right", "bias")]
    placed: dict[torch.device, LeaceEraser] = {}

    def erase(hidden: Tensor) -> Tensor:
        if hidden.device not in placed:
            placed[hidden.device] = LeaceEraser(*(part.to(hidden.device) for part in parts))
        erased: Tensor = placed[hidden.device](hidden.float())
        return erased.to(hidden.dtype)

    change_output(site.module, erase, attached)
