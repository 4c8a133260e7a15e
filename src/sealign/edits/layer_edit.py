"""LayerEdit: the edit of one layer, ready to be called on tokens, with the operator that computes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.edits.linear_change import linear_change
from sealign.edits.record import EditSettings
from sealign.errors import ActivationError
from sealign.spectral.projection import Projection

LIBRARY = torch.library.Library("sealign", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define(  # type: ignore[no-untyped-call]
    "edit_tokens(Tensor tokens, Tensor inner, Tensor outer, Tensor? shift, float scale, float strength, bool rescale)"
    " -> Tensor"
)


def edit_tokens(
    tokens: Float[Tensor, "*batch d"],
    inner: Float[Tensor, "d r"],
    outer: Float[Tensor, "r d"],
    shift: Float[Tensor, " d"] | None,
    scale: float,
    strength: float,
    rescale: bool,
) -> Float[Tensor, "*batch d"]:
    """Return linearly edited tokens: x' = x + s (q y - x) with y = x + scale x + (x inner) outer + shift.

    q is |x| / |y| per token where the edit is rescaled, and 1 where it is not or y is zero (Qiu et al. 2024, arXiv
    2405.09719, section 3). It is computed in the type of the factors. Beside the result there is no temporary of the
    size of the input, and two where its type is narrower.

    ``torch.ops.sealign.edit_tokens`` is the same as one operator of a graph, with a gradient with respect to the
    tokens; this function has none.

    Args:
        tokens: x.
        inner, outer: the factors, float32 or wider.
        shift: of a centred edit.
        scale: of the part that is not of low rank.
        strength: s.
        rescale: per token.
    """
    if torch.is_autocast_enabled(tokens.device.type):
        with torch.autocast(tokens.device.type, enabled=False):
            return edit_tokens(tokens, inner, outer, shift, scale, strength, rescale)
    # Written out rather than by the gradient's functions: each call is one for every layer of every token.
    x = tokens.reshape(-1, tokens.shape[-1]).to(inner.dtype)
    y = _linear(x, inner, outer, shift, scale)
    if rescale:
        norm = torch.linalg.vector_norm
        y.mul_(norm(x, dim=-1, keepdim=True).div_(norm(y, dim=-1, keepdim=True)).nan_to_num_(1.0, 1.0))
    if strength != 1:
        y.lerp_(x, 1 - strength)
    return y.to(tokens.dtype).reshape(tokens.shape)


def _rows(tokens: Tensor, inner: Tensor) -> Tensor:
    return tokens.reshape(-1, tokens.shape[-1]).to(inner.dtype)


def _linear(x: Tensor, inner: Tensor, outer: Tensor, shift: Tensor | None, scale: float) -> Tensor:
    y = torch.addmm(x, x @ inner, outer)
    if scale:
        y.add_(x, alpha=scale)
    return y if shift is None else y.add_(shift)


def _norm(rows: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return norm


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, inner, outer, shift, ctx.scale, ctx.strength, ctx.rescale = inputs
    ctx.save_for_backward(tokens, inner, outer, shift)


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """With g the gradient of x' and q = |x| / |y|, that of y is s q (g - (g.y) y / |y|^2), and that of |x| follows."""
    tokens, inner, outer, shift = ctx.saved_tensors
    x, g = _rows(tokens, inner), _rows(gradient, inner)
    of_y, of_norm = g, torch.zeros_like(g)
    if ctx.rescale:
        y = _linear(x, inner, outer, shift, ctx.scale)
        size, length = _norm(x), _norm(y)
        along = (g * y).sum(-1, keepdim=True)
        # Where x or y is zero its norm has no derivative; 0 is the one that torch takes.
        of_y = (size / length).nan_to_num(1.0, 1.0) * (g - y * (along / length.square()).nan_to_num(0.0, 0.0, 0.0))
        of_norm = x * (along / (size * length)).nan_to_num(0.0, 0.0, 0.0)
    through = (1 + ctx.scale) * of_y + (of_y @ outer.T) @ inner.T
    of_tokens = (1 - ctx.strength) * g + ctx.strength * (of_norm + through)
    return of_tokens.to(tokens.dtype).reshape(tokens.shape), None, None, None, None, None, None


LIBRARY.impl("edit_tokens", edit_tokens, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("sealign::edit_tokens", lambda tokens, *_: torch.empty_like(tokens), lib=LIBRARY)
torch.library.register_autograd("sealign::edit_tokens", _gradient, setup_context=_remember, lib=LIBRARY)


class LayerEdit:
    """The edit of one layer, ready to be called on tokens of any device and type.

    A linear edit, rescaled per token or not, is one operator on factors that stand side by side; every other is the
    projection itself. What is called on a device has its factors there.

    Args:
        projection: of the layer.
        settings: of the edit; its strength is given with each call.

    Example:
        >>> import torch
        >>> e = torch.eye(3)
        >>> projection = Projection(e[:, :1], e[:, 1:2], None, "identity", e[0, :1], e[0, :1], 1.0, 1.0)
        >>> edit = LayerEdit(projection, EditSettings("mlp", "both", "none", 1.0, "identity", False))
        >>> edit(torch.tensor([[1.0, 2.0, 3.0]]), 0.5)
        tensor([[1.5000, 1.0000, 3.0000]])
    """

    def __init__(self, projection: Projection, settings: EditSettings) -> None:
        self._projection = projection
        self._settings = settings
        self._width = projection.width
        self._placed: dict[tuple[torch.device, torch.dtype], Callable[[Tensor, float], Tensor]] = {}

    def place(self, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor, float], Tensor]:
        """Return the edit with its factors on a device, for tokens of a type; made once for each.

        Args:
            device: where tokens will be.
            dtype: of the tokens.
        """
        wide = torch.promote_types(dtype, torch.float32)
        if (device, wide) not in self._placed:
            # Under both types, so that a call finds it by its own; a third, as of autocast, shares its factors.
            self._placed[device, dtype] = self._placed[device, wide] = self._make(device, wide)
        return self._placed[device, wide]

    def __call__(self, tokens: Float[Tensor, "*batch d"], strength: float) -> Float[Tensor, "*batch d"]:
        """Return the edited tokens.

        Args:
            tokens: of any shape with d as the last axis.
            strength: s, any finite number.

        Raises:
            ActivationError: the last axis is not as wide as the projection.
        """
        if tokens.shape[-1] != self._width:
            raise ActivationError(
                f"tokens are {tokens.shape[-1]} wide, but the edit is {self._width}; use the model and site "
                "it was fitted on"
            )
        edit = self._placed.get((tokens.device, tokens.dtype)) or self.place(tokens.device, tokens.dtype)
        return edit(tokens, strength)

    def _make(self, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor, float], Tensor]:
        settings = self._settings
        if settings.feature_map != "identity" or settings.normalization == "feature":
            projection = self._projection.to(device)
            return lambda tokens, strength: projection(
                tokens,
                combine=settings.combine,  # type: ignore[arg-type]
                normalization=settings.normalization,  # type: ignore[arg-type]
                strength=strength,
            )
        change = linear_change(self._projection, dataclasses.replace(settings, strength=1.0))
        # Both lie a direction a row: a product with a thin matrix of columns takes more than twice as long.
        inner = change.right.to(device, dtype).contiguous().T
        outer = change.left.T.to(device, dtype).contiguous()
        shift = None if change.shift is None else change.shift.to(device, dtype)
        rescale = settings.normalization == "token"

        def edit(tokens: Tensor, strength: float) -> Tensor:
            # The operator is for graphs and gradients; without them it costs a dispatch more than the function.
            if torch.is_grad_enabled() or torch.compiler.is_compiling():
                found: Tensor = torch.ops.sealign.edit_tokens(
                    tokens, inner, outer, shift, change.scale, strength, rescale
                )
                return found
            return edit_tokens(tokens, inner, outer, shift, change.scale, strength, rescale)

        return edit
