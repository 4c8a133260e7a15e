"""The edit of one layer: the operator against the projection in float64, its gradient, and what it allocates."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sealign.edits.edit import Edit
from sealign.edits.layer_edit import LayerEdit
from sealign.edits.record import EditSettings
from sealign.errors import ActivationError
from sealign.spectral.projection import COMBINES, Projection

WIDTH = 13
OPERATOR = torch.ops.sealign.edit_tokens


def make_projection(*, width: int = WIDTH, centered: bool = False, feature_map: str = "identity") -> Projection:
    generator = torch.Generator().manual_seed(4)

    def basis(k: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(width, k, dtype=torch.float64, generator=generator))[0].contiguous()

    mean = torch.randn(width, dtype=torch.float64, generator=generator) / 3 if centered else None
    return Projection(basis(3), basis(2), mean, feature_map, torch.ones(3), torch.ones(2), 3.0, 2.0)


def settings_of(combine: Any = "both", normalization: Any = "token", feature_map: str = "identity") -> EditSettings:
    return EditSettings("mlp", combine, normalization, 1.0, feature_map, False)


def arguments(*, scale: float = -0.5, strength: float = 0.7, rescale: bool = True, shift: bool = True) -> list[Any]:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return [draw(2, 3, 5), draw(5, 4), draw(4, 5), draw(5) if shift else None, scale, strength, rescale]


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("normalization", ["token", "feature", "none"])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("feature_map", ["identity", "tanh"])
@pytest.mark.parametrize("grad", [False, True])
def test_it_is_the_projection(combine: Any, normalization: Any, centered: bool, feature_map: str, grad: bool) -> None:
    projection = make_projection(centered=centered, feature_map=feature_map)
    edit = LayerEdit(projection, settings_of(combine, normalization, feature_map))
    tokens = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    tokens[1, 2] = 0
    given = tokens.clone()
    with torch.set_grad_enabled(grad):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            expected = projection(tokens.to(dtype), combine=combine, normalization=normalization, strength=-0.4)
            torch.testing.assert_close(edit(tokens.to(dtype), -0.4), expected)
        assert torch.equal(tokens, given)


@pytest.mark.parametrize("feature_map", ["identity", "tanh"])
def test_another_width(feature_map: str) -> None:
    edit = LayerEdit(make_projection(feature_map=feature_map), settings_of(feature_map=feature_map))
    with pytest.raises(ActivationError, match="tokens are 6 wide, but the edit is 13; use the model and site"):
        edit(torch.zeros(2, 6), 1.0)


def test_norms_far_from_one() -> None:
    """The rescaling is by a quotient of norms, whatever their size."""
    projection = make_projection()
    tokens = torch.randn(4, WIDTH, dtype=torch.float64) * torch.tensor([[1e-15], [1e-6], [1e6], [1e15]]).double()
    expected = projection(tokens)
    found = LayerEdit(projection, settings_of())(tokens.float(), 1.0).double()
    torch.testing.assert_close(found / tokens.norm(dim=1, keepdim=True), expected / tokens.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_its_gradient(rescale: bool, shift: bool, scale: float) -> None:
    tokens, *others = arguments(rescale=rescale, shift=shift, scale=scale)
    assert torch.autograd.gradcheck(lambda x: OPERATOR(x, *others), tokens.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x: OPERATOR(x, *others), tokens)


def test_its_gradient_where_norms_are_zero() -> None:
    tokens, *others = arguments(shift=False)
    tokens[0, 1] = 0
    tokens.requires_grad_()
    (gradient,) = torch.autograd.grad(OPERATOR(tokens, *others).sum(), tokens)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_a_sound_operator(dtype: torch.dtype) -> None:
    """Schema, fake implementation, registration of the gradient, and traced with shapes that vary."""
    tokens, inner, outer, shift, *others = arguments()
    factors = (inner.float(), outer.float(), shift.float())
    torch.library.opcheck(OPERATOR, (tokens.to(dtype).requires_grad_(), *factors, *others))
    torch.library.opcheck(OPERATOR, (tokens.to(dtype), *factors[:2], None, *others))


def test_a_compiled_graph_is_whole_and_the_same() -> None:
    edit = LayerEdit(make_projection(), settings_of())
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)
    compiled = torch.compile(lambda x: edit(x @ weight, 0.7).square().sum(), fullgraph=True, backend="aot_eager")
    for rows in (2, 5):
        tokens = torch.randn(rows, WIDTH)
        expected = edit(tokens @ weight, 0.7).square().sum()
        torch.testing.assert_close(compiled(tokens), expected)
        found = [torch.autograd.grad(loss, weight)[0] for loss in (compiled(tokens), expected)]
        torch.testing.assert_close(*found)


def test_autocast_leaves_it_in_float32() -> None:
    edit, tokens = LayerEdit(make_projection(), settings_of()), torch.randn(3, WIDTH)
    expected = edit(tokens, 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert torch.equal(edit(tokens, 0.7), expected)


class Allocations(TorchDispatchMode):
    """Counts the memory that operations make anew, by its size in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self._seen: set[int] = set()
        self._kept: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [item for item in (*args, *(kwargs or {}).values()) if isinstance(item, torch.Tensor)]
        self._seen |= {item.untyped_storage().data_ptr() for item in given}
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.untyped_storage().data_ptr() not in self._seen:
            self.sizes.append(found.untyped_storage().nbytes())
            self._kept.append(found)  # or its address could be given to another
            self._seen.add(found.untyped_storage().data_ptr())
        return found


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1), (torch.bfloat16, 3)])
def test_what_it_allocates(dtype: torch.dtype, most: int) -> None:
    """The result, and beside it nothing of the size of the input but a wide copy of each end; never (d, d)."""
    width = 64
    tokens = torch.randn(11, width).to(dtype)
    edit = LayerEdit(make_projection(width=width), settings_of())
    edit.place(tokens.device, dtype)
    with torch.no_grad(), Allocations() as mode:
        edit(tokens, 0.7)
    large = [size for size in mode.sizes if size >= tokens.nbytes]
    assert 1 <= len(large) <= most
    assert max(mode.sizes) <= tokens.numel() * 4 < width * width * 4


def test_an_edit_of_a_real_shape(small_edit: Edit) -> None:
    """The operator on the factors of a fitted edit, in the type of the model, as the projection gives it."""
    tokens = torch.randn(5, small_edit.projections[small_edit.layers[0]].width)
    for layer, projection in small_edit.projections.items():
        edit = LayerEdit(projection, dataclasses.replace(small_edit.settings, strength=1.0))
        torch.testing.assert_close(edit(tokens, 0.25), projection(tokens, strength=0.25), msg=f"layer {layer}")
