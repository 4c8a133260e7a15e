"""The operator: its formula, its gradient, what it allocates, and how it is traced."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sealign.edits.operator import autocast_enabled, edit_tokens
from tests.edits.allocations import Allocations
from tests.edits.edit_data import draw

OPERATOR = torch.ops.sealign.edit_tokens


def operator(*given: Any) -> torch.Tensor:
    """Call the operator, whose strength is a tensor."""
    *others, strength, rescale = given
    found: torch.Tensor = OPERATOR(*others, torch.tensor(strength, dtype=torch.float64), rescale)
    return found


def arguments(*, scale: float = -0.5, strength: float = 0.7, rescale: bool = True, shift: bool = True) -> list[Any]:
    offset = draw(5, seed=10) if shift else None
    return [draw(2, 3, 5, seed=7), draw(5, 4, seed=8), draw(4, 5, seed=9), offset, scale, strength, rescale]


def formula(tokens: Any, inner: Any, outer: Any, shift: Any, scale: float, strength: float, rescale: bool) -> Any:
    """The definition, in float64 and token by token."""
    x, r, left = (np.asarray(value.double()) for value in (tokens, inner, outer))
    edited = np.empty_like(x)
    for index in np.ndindex(x.shape[:-1]):
        y = x[index] + scale * x[index] + (x[index] @ r) @ left
        if shift is not None:
            y = y + np.asarray(shift.double())
        if rescale and np.sum(y**2) > 0:
            y = y * np.sqrt(np.sum(x[index] ** 2) / np.sum(y**2))
        edited[index] = x[index] + strength * (y - x[index])
    return torch.from_numpy(edited)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("scale", [0.0, -0.5])
@pytest.mark.parametrize("strength", [1.0, 0.0, -1.0, 1.5, 0.3])
@pytest.mark.parametrize("function", [edit_tokens, operator], ids=["function", "operator"])
def test_formula(function: Any, strength: float, scale: float, shift: bool, rescale: bool) -> None:
    given = arguments(scale=scale, strength=strength, rescale=rescale, shift=shift)
    before = given[0].clone()
    torch.testing.assert_close(function(*given), formula(*given), rtol=1e-12, atol=1e-12)
    assert torch.equal(given[0], before)


def test_a_small_strength_is_not_rounded() -> None:
    """1 - s in float32 would lose the digits of a small s."""
    given = arguments(strength=1e-5, rescale=False)
    tokens = torch.zeros(2, 5)  # so that the change is all there is to see
    narrow: Any = [tokens, *(value.float() if isinstance(value, torch.Tensor) else value for value in given[1:])]
    torch.testing.assert_close(edit_tokens(*narrow).double(), formula(tokens, *given[1:]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("scale", [0.0, -0.5])
@pytest.mark.parametrize("strength", [0.7, 1.0, -1.5])
def test_gradient(rescale: bool, shift: bool, scale: float, strength: float) -> None:
    tokens, *others = arguments(rescale=rescale, shift=shift, scale=scale, strength=strength)
    assert torch.autograd.gradcheck(lambda x: operator(x, *others), tokens.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x: operator(x, *others), tokens)


def test_gradient_where_norms_are_zero() -> None:
    tokens, *others = arguments(shift=False)
    tokens[0, 1] = 0
    tokens.requires_grad_()
    (gradient,) = torch.autograd.grad(operator(tokens, *others).sum(), tokens)
    assert bool(gradient.isfinite().all())


def test_rows_whose_edit_is_zero_are_not_rescaled() -> None:
    """y = 0 has no direction to rescale."""
    tokens, identity = draw(3, 4), torch.eye(4, dtype=torch.float64)
    for function in (edit_tokens, operator):
        assert torch.equal(function(tokens, identity, -identity, None, 0.0, 1.0, True), torch.zeros_like(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "vector", "empty"])
def test_registration(dtype: torch.dtype, layout: str) -> None:
    """Schema, traced result, registration of the gradient, and tracing with varying shapes."""
    tokens, inner, outer, shift, *others = arguments()
    tokens = {
        "contiguous": tokens,
        "transposed": draw(2, 5, 3).transpose(1, 2),
        "sliced": draw(2, 3, 9)[..., 2:7],
        "vector": tokens[0, 0],
        "empty": tokens[:0],
    }[layout].to(dtype)
    factors = (inner.float(), outer.float(), shift.float())
    others[1] = torch.tensor(others[1])
    # A tensor without elements has no gradient to compare.
    torch.library.opcheck(OPERATOR, (tokens.requires_grad_(layout != "empty"), *factors, *others))
    torch.library.opcheck(OPERATOR, (tokens.detach(), *factors[:2], None, *others))


def test_autocast_changes_neither_the_result_nor_the_gradient() -> None:
    tokens, *others = arguments()
    others = [value.float() if isinstance(value, torch.Tensor) else value for value in others]
    tokens = tokens.float().requires_grad_()
    expected = operator(tokens, *others)
    (gradient,) = torch.autograd.grad(expected.square().sum(), tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found = operator(tokens, *others)
        (inside,) = torch.autograd.grad(found.square().sum(), tokens)
        with torch.no_grad():
            assert torch.equal(edit_tokens(tokens, *others), expected)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(found, expected)
    assert torch.equal(inside, gradient)


def test_autocast_by_device() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_enabled("cpu")
        assert not autocast_enabled("cuda")
        assert not autocast_enabled("meta")  # which has no autocast
    assert not autocast_enabled("cpu")


def test_meta_tensors() -> None:
    given: Any = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in arguments()]
    for function in (edit_tokens, operator):
        found = function(*given)
        assert found.is_meta
        assert found.shape == (2, 3, 5)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1), (torch.bfloat16, 3)])
def test_allocations(dtype: torch.dtype, most: int) -> None:
    """The result, and beside it nothing of the size of the input but a wide copy of each end; never (d, d)."""
    width, rank = 64, 5
    tokens = draw(11, width, dtype=dtype)
    factors = draw(width, rank, dtype=torch.float32), draw(rank, width, dtype=torch.float32)
    with torch.no_grad(), Allocations() as mode:
        edit_tokens(tokens, *factors, None, -0.5, 0.7, True)
    large = [size for size in mode.sizes if size >= tokens.nbytes]
    assert 1 <= len(large) <= most
    assert max(mode.sizes) <= tokens.numel() * 4 < width * width * 4
