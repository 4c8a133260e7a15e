"""Edits of one layer: the base class, and the low-rank affine edit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.edits.gate import Gate
from sealign.errors import ActivationError, SettingError, check_choice
from sealign.spectral.projection import NORMALIZATIONS, Normalization

Strength = float | Tensor
"""Strength as a number, or as a tensor of no dimensions, whose value a compiled graph is not bound to."""

EditFunction = Callable[[Tensor, Strength], Tensor]
"""Function of tokens and strength that returns the edited tokens."""


@dataclass(frozen=True, eq=False)
class LayerEdit(ABC):
    """Edit of one layer: x' = x + s (q y - x) for each token x, where the subclass defines y.

    With a gate, this holds for the tokens for which the gate is open; the others stay bit for bit.

    Attributes:
        normalization: How q is computed: ``token`` (|x| / |y| for each token), ``feature`` (the same ratio for each
            feature over all tokens of a sequence) or ``none`` (q = 1).
        gate: The tokens that are edited; None for all.

    Raises:
        SettingError: The normalization is unknown, or does not go with a gate; or the gate has another width.
    """

    normalization: Normalization = field(default="none", kw_only=True)
    gate: Gate | None = field(default=None, kw_only=True)
    _prepared: dict[tuple[torch.device, bool], EditFunction] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("normalization", self.normalization, NORMALIZATIONS)
        check_gate_normalization(self.gate is not None, self.normalization)
        shape = (self.width,) if self.gate is None else tuple(self.gate.probe.shape)
        if shape != (self.width,):
            raise SettingError(f"the probe of the gate has shape {shape}, but the edit has {self.width} features")

    @property
    @abstractmethod
    def width(self) -> int:
        """Number of features d of the activations."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """Rank of the edit."""

    @property
    @abstractmethod
    def groups(self) -> tuple[int, ...]:
        """Numbers of directions that a random control rotates together; empty if all are one group."""

    @property
    @abstractmethod
    def feature_map(self) -> str:
        """Name of the feature map; ``identity`` for an affine edit."""

    @property
    def is_causal(self) -> bool:
        """Whether the edited activation of a token depends on no later token; False for rescaling per feature."""
        return self.normalization != "feature"

    @abstractmethod
    def own_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the edit without those of its gate, by name."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are saved, by name."""
        return self.own_tensors() | ({} if self.gate is None else self.gate.tensors())

    @abstractmethod
    def randomized(self, seed: int) -> LayerEdit:
        """Return the edit with a random rotation applied to each group of its directions, as a control.

        Ranks, norms, and the angles between the directions of a group are preserved. The center does not change.

        Args:
            seed: Seed of the rotations; see ``random_rotation``.
        """

    @abstractmethod
    def reversed(self) -> LayerEdit:
        """Return the edit in the opposite direction, as a control."""

    @abstractmethod
    def _make(self, device: torch.device, dtype: torch.dtype) -> EditFunction:
        """Return the edit as a function of tokens and strength, with its factors on the given device and dtype."""

    def prepare(self, device: torch.device, dtype: torch.dtype) -> EditFunction:
        """Return the edit as a function of tokens and strength, with its factors on the given device, and cache it.

        Call it before torch.compile to avoid a graph break.

        Args:
            device: Device of the tokens.
            dtype: Data type of the tokens. The factors use float64 if it is float64, otherwise float32.
        """
        key = device, dtype == torch.float64
        if key not in self._prepared:
            # The cached factors must be usable in training, even if the first call is made in inference mode.
            with torch.inference_mode(False), torch.no_grad():
                wide = torch.float64 if key[1] else torch.float32
                made = self._make(device, wide)
                self._prepared[key] = made if self.gate is None else _gated(made, self.gate, device, wide)
        return self._prepared[key]

    def __call__(self, tokens: Float[Tensor, "*batch d"], strength: Strength = 1.0) -> Float[Tensor, "*batch d"]:
        """Return the edited tokens.

        Args:
            tokens: Activations of any shape whose last axis has length ``width``, on any device. Computation uses
                float32, or float64 for float64 tokens; autocast is disabled.
            strength: Strength s of the edit; any finite number. If it is the number 0, ``tokens`` is returned
                unchanged.

        Raises:
            ActivationError: The last axis does not have length ``width``.
            NormalizationError: A single vector is given to an edit that is rescaled per feature.
        """
        if tokens.shape[-1] != self.width:
            raise ActivationError(
                f"tokens have {tokens.shape[-1]} features, but the edit has {self.width}; use the model and the site "
                "that it was fitted on"
            )
        if not isinstance(strength, Tensor) and strength == 0:
            return tokens
        found = self._prepared.get((tokens.device, tokens.dtype == torch.float64))
        edit = found or self.prepare(tokens.device, tokens.dtype)
        return edit(tokens, strength)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the prepared functions, which cannot be pickled; they are built again when needed."""
        return {**vars(self), "_prepared": {}}

    def relative_change(self, tokens: Float[Tensor, "n d"], strength: float = 1.0) -> float:
        """Return the mean of |x' - x| / |x| over all tokens that are not zero.

        Args:
            tokens: Activations, (n, d).
            strength: Strength s of the edit.
        """
        lengths = tokens.norm(dim=-1)
        ratios = (self(tokens, strength) - tokens).norm(dim=-1)[lengths > 0] / lengths[lengths > 0]
        return float(ratios.mean()) if len(ratios) else 0.0


def _gated(edit: EditFunction, gate: Gate, device: torch.device, dtype: torch.dtype) -> EditFunction:
    """Return the function that edits the tokens for which a gate is open."""
    moved = Gate(move_factor(gate.probe, device, dtype), gate.threshold)

    def edit_open(tokens: Tensor, strength: Strength) -> Tensor:
        return torch.where(moved.is_open(tokens.to(dtype)), edit(tokens, strength), tokens)

    return edit_open


def check_gate_normalization(gated: bool, normalization: str) -> None:
    """Raise an error if an edit is gated and rescaled per feature.

    Args:
        gated: Whether the edit has a gate.
        normalization: How the edit is rescaled.

    Raises:
        SettingError: Both: the gate edits single tokens, and the rescaling depends on all of them.
    """
    if gated and normalization == "feature":
        raise SettingError(
            "a gate edits single tokens, but normalization is 'feature', which rescales over all tokens; use "
            "normalization='token' or 'none'"
        )


def move_factor(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Move a factor to a device and dtype, detached; inference tensors are cloned.

    Autograd cannot save an inference tensor for the backward pass.

    Args:
        tensor: Factor to move.
        device: Device of the tokens.
        dtype: Data type in which the edit is computed.
    """
    return (tensor.clone() if tensor.is_inference() else tensor.detach()).to(device, dtype)
