"""The operator that applies a low-rank affine edit to tokens: ``torch.ops.sealign.edit_tokens``."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

LIBRARY = torch.library.Library("sealign", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define(  # type: ignore[no-untyped-call]
    "edit_tokens(Tensor tokens, Tensor inner, Tensor outer, Tensor? shift, float scale, Tensor strength, bool rescale)"
    " -> Tensor"
)


def edit_tokens(
    tokens: Float[Tensor, "*batch d"],
    inner: Float[Tensor, "d r"],
    outer: Float[Tensor, "r d"],
    shift: Float[Tensor, " d"] | None,
    scale: float,
    strength: float | Tensor,
    rescale: bool,
) -> Float[Tensor, "*batch d"]:
    """Return edited tokens x' = x + s (q y - x) with y = x + scale x + (x inner) outer + shift.

    q is |x| / |y| for each token if the edit is rescaled, and 1 if it is not or y is zero (Qiu et al. 2024, arXiv
    2405.09719, section 3). The result is computed in the type of the factors and returned in the type of the tokens.
    Apart from the result, the function allocates no temporary of the size of the input, or two if the input has a
    narrower type than the factors.

    ``torch.ops.sealign.edit_tokens`` computes the same as one operator of a graph and has a gradient with respect to
    the tokens; this function has none. Its strength is a tensor, so that a graph is not bound to one value.

    Args:
        tokens: Activations x, (..., d).
        inner: Transposed right factor, (d, r), float32 or wider.
        outer: Transposed left factor, (r, d), of the same type.
        shift: Constant part of the edit, (d,), or None.
        scale: Coefficient of the additional term scale x.
        strength: Strength s of the edit; any finite number, or a tensor of no dimensions on the device of the tokens.
        rescale: Whether y is rescaled to the norm of x, token by token.
    """
    if autocast_enabled(tokens.device.type):
        with torch.autocast(tokens.device.type, enabled=False):
            return edit_tokens(tokens, inner, outer, shift, scale, strength, rescale)
    if isinstance(strength, Tensor) and strength.device.type == "cpu":
        strength = float(strength)  # which waits for nothing there
    x = _rows(tokens, inner)
    if not rescale and not isinstance(strength, Tensor):
        return _affine(x, inner, outer, shift, scale, strength).type_as(tokens).view_as(tokens)
    y = _affine(x, inner, outer, shift, scale, 1.0)
    if rescale:
        y.mul_(_norm(x).div_(_norm(y)).nan_to_num_(1.0, 1.0))
    if isinstance(strength, Tensor):
        torch.lerp(x, y, strength.to(x.dtype), out=y)
    elif strength != 1:
        torch.lerp(x, y, strength, out=y)
    # Torch takes a microsecond less to parse the arguments of these than those of ``to`` and ``reshape``.
    return y.type_as(tokens).view_as(tokens)


def autocast_enabled(device_type: str) -> bool:
    """Return whether autocast is on for a type of device; False if the device has no autocast, as ``meta``.

    Args:
        device_type: Type of the device, such as ``cuda``.
    """
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _rows(tokens: Tensor, inner: Tensor) -> Tensor:
    return tokens.reshape(-1, tokens.shape[-1]).type_as(inner)


def _affine(x: Tensor, inner: Tensor, outer: Tensor, shift: Tensor | None, scale: float, strength: float) -> Tensor:
    """Return x + s (scale x + (x inner) outer + shift), in as few operations as there are parts."""
    own = 1 + strength * scale
    if not outer.shape[0]:
        if shift is not None and own == 1:
            return torch.add(x, shift, alpha=strength)
        y = x * own
    elif own == strength == 1:
        y = torch.addmm(x, torch.mm(x, inner), outer)
    else:
        y = torch.addmm(x, torch.mm(x, inner), outer, beta=own, alpha=strength)
    return y if shift is None else y.add_(shift, alpha=strength)


def _norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, 2, -1, True)  # type: ignore[no-any-return]


def _save_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - torch gives it
    tokens, inner, outer, shift, ctx.scale, strength, ctx.rescale = inputs
    ctx.save_for_backward(tokens, inner, outer, shift, strength)


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradient with respect to the tokens.

    With g the gradient of x' and q = |x| / |y|, the gradient of y is s q (g - (g.y) y / |y|^2); the gradient of |x|
    follows.
    """
    tokens, inner, outer, shift, strength = ctx.saved_tensors
    if autocast_enabled(tokens.device.type):
        with torch.autocast(tokens.device.type, enabled=False):
            return _gradient(ctx, gradient)
    x, g = _rows(tokens, inner), _rows(gradient, inner)
    of_y, of_norm = g, torch.zeros_like(g)
    if ctx.rescale:
        y = _affine(x, inner, outer, shift, ctx.scale, 1.0)
        size, length = _norm(x), _norm(y)
        along = (g * y).sum(-1, keepdim=True)
        # The norm has no derivative at x = 0 or y = 0; torch uses 0 there, and so does this.
        of_y = (size / length).nan_to_num(1.0, 1.0) * (g - y * (along / length.square()).nan_to_num(0.0, 0.0, 0.0))
        of_norm = x * (along / (size * length)).nan_to_num(0.0, 0.0, 0.0)
    through = (1 + ctx.scale) * of_y + (of_y @ outer.T) @ inner.T
    of_tokens = torch.lerp(g, of_norm + through, strength.to(g.dtype))
    return of_tokens.type_as(tokens).view_as(tokens), None, None, None, None, None, None


def _shape(tokens: Tensor, *_: Any) -> Tensor:
    """Return an empty tensor with the shape, type and strides of the result, for tracing."""
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)


LIBRARY.impl("edit_tokens", edit_tokens, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("sealign::edit_tokens", _shape, lib=LIBRARY)
torch.library.register_autograd("sealign::edit_tokens", _gradient, setup_context=_save_for_gradient, lib=LIBRARY)
