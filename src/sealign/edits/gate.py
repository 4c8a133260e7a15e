"""The gate of an edit: the tokens that the edit acts on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

PROBE, THRESHOLD = "gate_probe", "gate_threshold"
"""Names under which the tensors of a gate are saved."""


@dataclass(frozen=True, eq=False)
class Gate:
    """A gate that is open for a token with activation x where w . x > t, and leaves all other tokens as they are.

    Attributes:
        probe: Probe w, (d,).
        threshold: Threshold t, finite.

    Example:
        >>> gate = Gate(torch.tensor([1.0, 0.0]), 0.5)
        >>> gate.is_open(torch.tensor([[0.4, 9.0], [0.6, -9.0]]))
        tensor([[False],
                [ True]])
    """

    probe: Float[Tensor, " d"]
    threshold: float

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Gate | None:
        """Return the gate among the saved tensors of a layer, or None if there is none."""
        if PROBE not in tensors:
            return None
        return cls(tensors[PROBE], float(tensors[THRESHOLD]))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are saved, by name."""
        return {PROBE: self.probe, THRESHOLD: torch.tensor(self.threshold, dtype=torch.float64)}

    def is_open(self, tokens: Float[Tensor, "*batch d"]) -> Bool[Tensor, "*batch 1"]:
        """Return for which tokens the gate is open.

        Args:
            tokens: Activations, in the type and on the device of the probe.
        """
        # A sum of products rather than a matrix product, which autocast would compute in a narrow type.
        return (tokens * self.probe).sum(-1, keepdim=True) > self.threshold
