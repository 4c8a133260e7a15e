"""The affine edit of one layer, against its formula in float64, and what all edits of a layer have in common."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sealign.edits.affine_edit import AffineEdit
from sealign.edits.edit import Edit
from sealign.edits.feature_map_edit import FeatureMapEdit
from sealign.edits.layer_edit import LayerEdit
from sealign.errors import ActivationError, NormalizationError, SettingError
from sealign.methods.sea import projection_edit
from sealign.spectral.feature_maps import FEATURE_MAPS
from sealign.spectral.projection import COMBINES, NORMALIZATIONS, Projection
from tests.edits.allocations import Allocations
from tests.edits.edit_data import WIDTH, bits, draw, make_affine, make_projection
from tests.shapes import unchecked

TERMS = list(itertools.product((0.0, -0.5), (False, True), (False, True)))
"""Scale, shift, center."""

STRENGTHS = (0.0, 1.0, -0.7, 1.5, 1e-4)


def formula(edit: AffineEdit, tokens: Tensor, strength: float) -> Tensor:
    """The definition with a dense (d, d) matrix, in float64."""
    d = edit.width
    left, right = (np.asarray(factor.double()) for factor in (edit.left, edit.right))
    shift, center = (np.zeros(d) if x is None else np.asarray(x.double()) for x in (edit.shift, edit.center))
    x = np.asarray(tokens.double())
    y = x + (x - center) @ (edit.scale * np.eye(d) + left @ right).T + shift
    if edit.normalization != "none":
        axis = -1 if edit.normalization == "token" else -2
        norms = np.linalg.norm(y, axis=axis, keepdims=True)
        y = y * np.where(norms > 0, np.linalg.norm(x, axis=axis, keepdims=True) / np.where(norms > 0, norms, 1), 1)
    return torch.from_numpy(x + strength * (y - x))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(("scale", "shift", "center"), TERMS)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
def test_formula(normalization: Any, scale: float, shift: bool, center: bool, grad: bool) -> None:
    edit = make_affine(scale=scale, shift=shift, center=center, normalization=normalization)
    for strength, shape in itertools.product(STRENGTHS, [(6, WIDTH), (2, 3, WIDTH), (2, 1, 3, WIDTH), (0, WIDTH)]):
        tokens = draw(*shape, seed=1)
        given = tokens.clone()
        with torch.set_grad_enabled(grad):
            found = edit(tokens, strength)
        torch.testing.assert_close(found, formula(edit, tokens, strength), rtol=1e-10, atol=1e-10)
        assert torch.equal(tokens, given)


@pytest.mark.parametrize("normalization", ["token", "none"])
def test_a_single_vector(normalization: Any) -> None:
    edit = make_affine(scale=-0.5, shift=True, center=True, normalization=normalization)
    torch.testing.assert_close(edit(draw(WIDTH), 0.7), formula(edit, draw(WIDTH), 0.7))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)],
)
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16])
def test_number_types(normalization: Any, dtype: torch.dtype, precision: float, stored: torch.dtype) -> None:
    """Narrow tokens are computed in float32, so that the result is the formula's, rounded to their type once."""
    edit = make_affine(scale=-0.5, shift=True, center=True, normalization=normalization, dtype=stored)
    tokens = draw(4, 7, WIDTH, seed=2, dtype=dtype)
    for strength in (1.0, 0.4):
        found = edit(tokens, strength)
        assert found.dtype == dtype
        expected = formula(edit, tokens, strength)
        torch.testing.assert_close(
            found.double(), expected, rtol=1.01 * precision, atol=4e-6 if precision > 1e-9 else 0
        )


def test_layouts_of_memory() -> None:
    edit = make_affine(normalization="token", shift=True)
    transposed, sliced = draw(3, WIDTH, 2).transpose(1, 2), draw(3, 2 * WIDTH)[:, ::2]
    for tokens in (transposed, sliced):
        torch.testing.assert_close(edit(tokens, 0.7), formula(edit, tokens, 0.7))
    factors = make_affine()
    columns = AffineEdit(factors.left.T.contiguous().T, factors.right.T.contiguous().T)
    torch.testing.assert_close(columns(draw(3, WIDTH)), formula(factors, draw(3, WIDTH), 1.0))


@pytest.mark.parametrize("normalization", ["token", "feature"])
def test_zero_tokens_and_zero_edits(normalization: Any) -> None:
    """Where y is zero there is nothing to rescale; a zero token stays zero unless there is a constant part."""
    tokens = draw(2, 4, WIDTH)
    tokens[1, 2] = 0
    edit = make_affine(normalization=normalization)
    torch.testing.assert_close(edit(tokens, 0.7), formula(edit, tokens, 0.7))
    eye = torch.eye(WIDTH, dtype=torch.float64)
    erase = AffineEdit(-eye, eye, normalization=normalization)
    assert torch.equal(erase(tokens), torch.zeros_like(tokens))
    torch.testing.assert_close(erase(tokens, 0.25), 0.75 * tokens)


def test_norms_far_from_one() -> None:
    """The rescaling is by a quotient of norms, whatever their size."""
    edit = make_affine(normalization="token")
    tokens = draw(4, WIDTH) * torch.tensor([[1e-15], [1e-6], [1e6], [1e15]]).double()
    found, expected = edit(tokens.float()).double(), formula(edit, tokens, 1.0)
    scale = tokens.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found / scale, expected / scale, rtol=1e-5, atol=1e-5)


def test_strength_zero_returns_the_tokens_themselves() -> None:
    for edit in (make_affine(shift=True), FeatureMapEdit(make_projection(feature_map="tanh"))):
        tokens = draw(3, WIDTH)
        assert edit(tokens, 0) is tokens
        assert edit(tokens, -0.0) is tokens


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("feature_map", ["identity", "tanh", "elu", "squared_exponential"])
@pytest.mark.parametrize("grad", [False, True])
def test_sea(combine: Any, normalization: Any, centered: bool, feature_map: str, grad: bool) -> None:
    """The edit that SEA makes of a projection does what the projection does."""
    projection = make_projection(centered=centered, feature_map=feature_map)
    edit = projection_edit(projection, combine=combine, normalization=normalization)
    assert isinstance(edit, AffineEdit if feature_map == "identity" else FeatureMapEdit)
    tokens = draw(2, 7, WIDTH)
    tokens[1, 2] = 0
    given = tokens.clone()
    with torch.set_grad_enabled(grad):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            expected = projection(tokens.to(dtype), combine=combine, normalization=normalization, strength=-0.4)
            torch.testing.assert_close(edit(tokens.to(dtype), -0.4), expected)
        assert torch.equal(tokens, given)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("centered", [False, True])
def test_linear_and_constant_part(combine: Any, centered: bool) -> None:
    """A linear edit is a change of low rank and a constant, which are what exports write into weights and biases."""
    projection, tokens = make_projection(centered=centered), draw(5, WIDTH)
    edit: Any = projection_edit(projection, combine=combine, normalization="none")
    found = tokens.T + 0.3 * edit.linear_part(tokens.T)
    constant = edit.constant_part()
    if constant is not None:
        found = found + 0.3 * constant[:, None]
    expected = projection(tokens, combine=combine, normalization="none", strength=0.3)
    torch.testing.assert_close(found.T, expected)
    assert (constant is None) is not centered
    assert edit.rank == {"both": 5, "reversed": 5, "average": 5, "positive": 3, "negative": 2}[combine]
    assert (edit.scale == 0) is (combine in ("both", "reversed", "negative"))


@pytest.mark.parametrize(("scale", "shift", "center"), TERMS)
def test_parts_of_any_affine_edit(scale: float, shift: bool, center: bool) -> None:
    edit = make_affine(scale=scale, shift=shift, center=center, dtype=torch.float32)
    columns = draw(WIDTH, 3)
    constant = edit.constant_part()
    assert edit.linear_part(columns.float()).dtype == torch.float32
    found = columns + edit.linear_part(columns) + (0 if constant is None else constant[:, None])
    torch.testing.assert_close(found, formula(edit, columns.T, 1.0).T, rtol=1e-10, atol=1e-10)
    assert (constant is None) is not (shift or center)
    assert constant is None or constant.dtype == torch.float64


def test_a_constant_part_that_is_zero() -> None:
    zero = torch.zeros(WIDTH, dtype=torch.float64)
    edit = make_affine()
    assert AffineEdit(edit.left, edit.right, shift=zero, center=zero).constant_part() is None
    far = AffineEdit.constant(draw(WIDTH))
    assert torch.equal(AffineEdit(far.left, far.right, center=draw(WIDTH), shift=zero).tensors()["shift"], zero)
    assert AffineEdit(far.left, far.right, center=draw(WIDTH)).constant_part() is None  # rank 0 about any center


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_pure_shift(normalization: Any, dtype: torch.dtype) -> None:
    shift = draw(WIDTH, dtype=dtype)
    edit = AffineEdit.constant(shift, normalization=normalization)
    assert (edit.rank, edit.width, edit.scale, edit.center) == (0, WIDTH, 0.0, None)
    tokens = draw(3, 4, WIDTH, seed=1)
    torch.testing.assert_close(edit(tokens, 2.0), formula(edit, tokens, 2.0), rtol=1e-10, atol=1e-10)
    if normalization == "none":
        torch.testing.assert_close(edit(tokens, 2.0), tokens + 2 * shift.double())


@pytest.mark.parametrize("feature_map", ["identity", "tanh"])
def test_another_width_is_refused(feature_map: str) -> None:
    edit = projection_edit(make_projection(feature_map=feature_map))
    for strength in (0.0, 1.0):
        with pytest.raises(ActivationError, match="tokens have 6 features, but the edit has 11; use the model and the"):
            edit(torch.zeros(2, 6), strength)


@pytest.mark.parametrize("feature_map", ["identity", "tanh"])
def test_rescaling_a_single_vector_per_feature_is_refused(feature_map: str) -> None:
    edit = projection_edit(make_projection(feature_map=feature_map), normalization="feature")
    with pytest.raises(NormalizationError, match=r"needs a \(tokens, d\) tensor.*; use normalization='token'"):
        edit(draw(WIDTH))


def test_factors_that_do_not_fit_are_refused() -> None:
    edit = make_affine()
    bad: list[tuple[Any, str]] = [
        ((edit.left, edit.right[:3]), "right"),
        ((edit.left, edit.right[:, :5]), "right"),
        ((edit.left[0], edit.right), "left"),
        ((edit.left, edit.right, 0.0, draw(1)), "shift"),
        ((edit.left, edit.right, 0.0, None, draw(WIDTH + 1)), "center"),
    ]
    with unchecked():
        for arguments, named in bad:
            with pytest.raises(SettingError, match=rf"the factors have shapes .*left \(d, r\).*; check {named}"):
                AffineEdit(*arguments)


@pytest.mark.parametrize("groups", [(3,), (3, 2), (5, -1), (4, 0), (4, 4)])
def test_groups_that_do_not_fit_are_refused(groups: tuple[int, ...]) -> None:
    message = rf"groups is {re.escape(str(groups))}, but it must be positive numbers whose sum is the rank, 4"
    with pytest.raises(SettingError, match=message):
        make_affine(rank=4, groups=groups)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SettingError, match=r"unknown normalization 'tokne' \(did you mean 'token'\?\)"):
        make_affine(normalization="tokne")
    with pytest.raises(SettingError, match=r"unknown combination 'bth' \(did you mean 'both'\?\)"):
        FeatureMapEdit(make_projection(feature_map="tanh"), "bth")  # type: ignore[arg-type]


def columns_of(edit: LayerEdit) -> Tensor:
    """All directions of an edit, side by side."""
    if isinstance(edit, FeatureMapEdit):
        return torch.cat([edit.projection.positive, edit.projection.negative], dim=1)
    assert isinstance(edit, AffineEdit)
    return torch.cat([edit.left, edit.right.T, *([] if edit.shift is None else [edit.shift[:, None]])], dim=1)


@pytest.mark.parametrize(("width", "rank"), [(12, 3), (5, 3), (5, 5), (4, 6), (7, 0)])
@pytest.mark.parametrize("shift", [False, True])
def test_the_random_control(width: int, rank: int, shift: bool) -> None:
    """Everything but the direction stays: ranks, singular values, lengths, angles, center, scale; also if 2r+1 > d."""
    edit = make_affine(width, rank, scale=-0.5, shift=shift, center=True, normalization="token")
    control = edit.randomized(2)
    assert (control.width, control.rank, control.scale, control.normalization) == (width, rank, -0.5, "token")
    assert control.center is edit.center
    before, after = columns_of(edit), columns_of(control)
    torch.testing.assert_close(after.T @ after, before.T @ before, rtol=1e-10, atol=1e-10)
    # What follows from that, computed in other ways.
    old, new = (np.linalg.svd(np.asarray(e.left @ e.right))[1] for e in (edit, control))
    np.testing.assert_allclose(new, old, atol=1e-10)
    assert np.linalg.matrix_rank(np.asarray(control.left @ control.right)) == min(rank, width)
    bases = [[np.linalg.qr(np.asarray(f))[0] for f in (e.left, e.right.T)] for e in (edit, control)]
    angles = [np.linalg.svd(left.T @ right)[1] if rank else np.zeros(0) for left, right in bases]
    np.testing.assert_allclose(angles[1], angles[0], atol=1e-10)
    if shift:
        assert edit.shift is not None
        assert control.shift is not None
        torch.testing.assert_close(control.shift.norm(), edit.shift.norm())
        assert not torch.allclose(control.shift, edit.shift)
    if rank:
        assert not torch.allclose(control.left, edit.left)
    if 2 * rank >= width:  # the rotation is known everywhere
        rotation = after @ torch.linalg.pinv(before)
        torch.testing.assert_close(rotation.T @ rotation, torch.eye(width).double(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("feature_map", ["identity", "tanh"])
def test_the_random_control_of_sea(feature_map: str) -> None:
    projection = make_projection(40, (3, 4), centered=True, feature_map=feature_map)
    edit: Any = projection_edit(projection)
    assert edit.groups == (3, 4)
    control = edit.randomized(2)
    before, after = columns_of(edit), columns_of(control)
    for group in (slice(0, 3), slice(3, 7)):
        torch.testing.assert_close(after[:, group].T @ after[:, group], before[:, group].T @ before[:, group])
    # Kept and dropped directions are rotated independently.
    assert not torch.allclose(after[:, :3].T @ after[:, 3:7], before[:, :3].T @ before[:, 3:7], atol=1e-3)
    # A random subspace of 7 of 40 dimensions is far from the fitted one.
    basis, other = torch.linalg.qr(before[:, :7])[0], torch.linalg.qr(after[:, :7])[0]
    assert float((basis.T @ other).square().sum()) < 0.5 * 7
    if feature_map == "tanh":
        assert control.projection.mean is projection.mean
        for factor in (control.projection.positive, control.projection.negative):
            torch.testing.assert_close(factor.T @ factor, torch.eye(factor.shape[1]).double())


@pytest.mark.parametrize("edit", [make_affine(shift=True), FeatureMapEdit(make_projection(feature_map="tanh"))])
def test_random_controls_by_seed(edit: LayerEdit) -> None:
    assert torch.equal(columns_of(edit.randomized(3)), columns_of(edit.randomized(3)))
    assert not torch.allclose(columns_of(edit.randomized(3)), columns_of(edit.randomized(4)))


@pytest.mark.parametrize("feature_map", ["identity", "tanh"])
def test_controls_form_no_square_matrix(feature_map: str) -> None:
    width = 400
    edit = projection_edit(make_projection(width, (2, 3), feature_map=feature_map, centered=True))
    with Allocations() as mode:
        edit.randomized(1)
        edit.reversed()
    assert mode.sizes
    assert max(mode.sizes) <= 2 * 5 * width * 8 < width * width


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_controls_keep_the_number_type(dtype: torch.dtype) -> None:
    edit = make_affine(shift=True, center=True, dtype=dtype)
    for control in (edit.randomized(0), edit.reversed()):
        assert {name: (x.dtype, x.shape) for name, x in control.tensors().items()} == {
            name: (x.dtype, x.shape) for name, x in edit.tensors().items()
        }
        assert all(tensor.is_contiguous() for tensor in control.tensors().values())


@pytest.mark.parametrize(("scale", "shift", "center"), TERMS)
@pytest.mark.parametrize("normalization", ["token", "none"])
def test_the_reversal(normalization: Any, scale: float, shift: bool, center: bool) -> None:
    """The change is opposite; twice reversed is the edit itself, to the bit."""
    edit = make_affine(scale=scale, shift=shift, center=center, normalization=normalization)
    back, tokens = edit.reversed(), draw(4, WIDTH, seed=1)
    twice = back.reversed()
    assert {name: bits(x) for name, x in twice.tensors().items()} == {
        name: bits(x) for name, x in edit.tensors().items()
    }
    assert repr(twice.scale) == repr(edit.scale)
    assert repr(back.scale) == repr(0.5 if scale else 0.0)
    if normalization == "none":
        torch.testing.assert_close(back(tokens, 0.7), edit(tokens, -0.7))
        torch.testing.assert_close(back(tokens) - tokens, tokens - edit(tokens))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("feature_map", ["identity", "tanh"])
def test_the_reversal_of_sea_exchanges_roles(normalization: Any, centered: bool, feature_map: str) -> None:
    projection = make_projection(centered=centered, feature_map=feature_map)
    edit = projection_edit(projection, normalization=normalization)
    tokens = draw(2, 5, WIDTH)
    exchanged = projection_edit(projection.reversed(), normalization=normalization)
    torch.testing.assert_close(edit.reversed()(tokens, 0.6), exchanged(tokens, 0.6))
    named = projection_edit(projection, combine="reversed", normalization=normalization)
    torch.testing.assert_close(edit.reversed()(tokens, 0.6), named(tokens, 0.6))
    assert not torch.allclose(edit(tokens, 0.6), exchanged(tokens, 0.6))
    assert {k: bits(x) for k, x in edit.reversed().reversed().tensors().items()} == {
        k: bits(x) for k, x in edit.tensors().items()
    }


def test_factors_are_prepared_once_for_each_device_and_width() -> None:
    edit, cpu = make_affine(dtype=torch.float32), torch.device("cpu")
    functions = [edit.prepare(cpu, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    assert functions[0] is functions[1] is functions[2] is edit.prepare(cpu, torch.float32)
    for dtype in (torch.float8_e4m3fn, torch.int8, torch.uint8):  # of quantised weights
        assert edit.prepare(cpu, dtype) is functions[0]
    assert edit.prepare(cpu, torch.float64) is not functions[0]
    assert edit.prepare(torch.device("meta"), torch.float32) is not functions[0]


@pytest.mark.parametrize("edit", [make_affine(shift=True), FeatureMapEdit(make_projection(feature_map="tanh"))])
def test_copies(edit: LayerEdit) -> None:
    expected = edit(draw(3, WIDTH))  # prepares it
    for same in (copy.deepcopy(edit), copy.copy(edit), pickle.loads(pickle.dumps(edit))):
        assert type(same) is type(edit)
        assert torch.equal(same(draw(3, WIDTH)), expected)


@pytest.mark.parametrize("feature_map", ["identity", "tanh"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_first_used_in_inference_mode_then_in_training(feature_map: str, normalization: Any) -> None:
    def gradient(edit: LayerEdit) -> Tensor:
        tokens = draw(3, WIDTH, dtype=torch.float32).requires_grad_()
        return torch.autograd.grad(edit(tokens, 0.7).square().sum(), tokens)[0]

    def make() -> LayerEdit:
        projection = make_projection(feature_map=feature_map, dtype=torch.float32, centered=True)
        return projection_edit(projection, normalization=normalization)

    expected = gradient(make())
    with torch.inference_mode():
        made_outside = make()
    edits = [make(), made_outside]
    with torch.inference_mode():
        for edit in edits:
            edit(draw(3, WIDTH, dtype=torch.float32), 0.7)
    for edit in edits:
        assert torch.equal(gradient(edit), expected)


def test_factors_with_a_history() -> None:
    """An edit of factors that were computed with gradients keeps no graph alive."""
    left, right = draw(WIDTH, 2).requires_grad_(), draw(2, WIDTH).requires_grad_()
    for normalization in NORMALIZATIONS:
        edit = AffineEdit(2 * left, right, shift=left[:, 0], normalization=normalization)  # type: ignore[arg-type]
        assert not edit(draw(3, WIDTH)).requires_grad
        assert edit(draw(3, WIDTH).requires_grad_()).requires_grad


@pytest.mark.parametrize("feature_map", ["identity", "tanh", "elu", "squared_exponential"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradient(feature_map: str, normalization: Any) -> None:
    edit = projection_edit(make_projection(feature_map=feature_map, centered=True), normalization=normalization)
    tokens = draw(4, WIDTH).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: edit(x, 0.7), tokens, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("feature_map", ["identity", "tanh"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_autocast_changes_nothing(feature_map: str, normalization: Any) -> None:
    projection = make_projection(feature_map=feature_map, dtype=torch.float32)
    edit, tokens = projection_edit(projection, normalization=normalization), draw(3, WIDTH, dtype=torch.float32)
    expected = edit(tokens, 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert torch.equal(edit(tokens, 0.7), expected)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradients_are_finite_where_a_feature_of_all_tokens_becomes_zero(feature_map: str, normalization: Any) -> None:
    """As the inverse of the squared exponential gives for values of 1 and more, to which it clips."""
    for seed in range(20):
        torch.manual_seed(seed)
        factors = [torch.linalg.qr(torch.randn(WIDTH, k))[0] for k in (3, 2)]
        projection = Projection(*factors, torch.randn(WIDTH), feature_map)  # type: ignore[call-arg,arg-type]
        tokens = (3 * torch.randn(2, WIDTH)).requires_grad_()
        edited = projection_edit(projection, normalization=normalization)(tokens, 0.7)
        assert torch.autograd.grad(edited.square().sum(), tokens)[0].isfinite().all(), seed


@pytest.mark.slow
def test_compiled_graphs_are_whole_and_the_same() -> None:
    script = Path(__file__).with_name("compiled.py")
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", script, "layers"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_a_compiled_graph_that_is_the_first_to_use_an_edit() -> None:
    torch._dynamo.reset()
    edit, tokens = make_affine(normalization="token", dtype=torch.float32), draw(3, WIDTH, dtype=torch.float32)
    compiled = torch.compile(edit, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(tokens, 0.7).double(), formula(edit, tokens, 0.7), rtol=1e-5, atol=1e-5)


def change_by_formula(edit: AffineEdit, tokens: Tensor, strength: float) -> float:
    changes = []
    for x, edited in zip(np.asarray(tokens.double()), np.asarray(formula(edit, tokens, strength)), strict=True):
        if np.any(x):
            changes.append(np.sqrt(np.sum((edited - x) ** 2) / np.sum(x**2)))
    return float(np.mean(changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("combine", ["both", "positive", "negative"])
@pytest.mark.parametrize("normalization", ["token", "none"])
@pytest.mark.parametrize("strength", [0.6, -1.5])
def test_relative_change(dtype: torch.dtype, combine: Any, normalization: Any, strength: float) -> None:
    edit: Any = projection_edit(make_projection(dtype=dtype), combine=combine, normalization=normalization)
    tokens = (draw(6, WIDTH) * torch.logspace(-2, 2, 6)[:, None]).to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    expected = change_by_formula(edit, tokens, strength)
    assert edit.relative_change(tokens, strength) == pytest.approx(expected, rel=tolerance)


def test_strength_zero_is_no_relative_change() -> None:
    assert make_affine(shift=True).relative_change(draw(6, WIDTH), 0.0) == 0.0


@pytest.mark.parametrize("normalization", ["token", "none"])
@pytest.mark.parametrize("shift", [False, True])
def test_zero_tokens_do_not_count_in_the_relative_change(normalization: Any, shift: bool) -> None:
    """A shift moves even a zero token, by infinitely many times its length."""
    edit = make_affine(normalization=normalization, shift=shift)
    tokens = draw(6, WIDTH)
    with_zero = torch.cat([torch.zeros(1, WIDTH, dtype=torch.float64), tokens])
    assert edit.relative_change(with_zero) == pytest.approx(edit.relative_change(tokens), rel=1e-9)
    assert edit.relative_change(with_zero) == pytest.approx(change_by_formula(edit, with_zero, 1.0), rel=1e-9)
    assert edit.relative_change(torch.zeros(3, WIDTH, dtype=torch.float64)) == 0.0


def test_a_fitted_edit(small_edit: Edit) -> None:
    """The operator on the factors of a fit, in the type of the model, against the formula."""
    for edit in small_edit.affine_edits.values():
        tokens = draw(5, edit.width, dtype=torch.float32)
        torch.testing.assert_close(edit(tokens, 0.25).double(), formula(edit, tokens, 0.25), rtol=1e-5, atol=1e-5)


def test_allocations() -> None:
    """Without gradients an edit allocates its result, and nothing else of the size of the input."""
    width = 64
    tokens = draw(11, width, dtype=torch.float32)
    edit = make_affine(width, 3, normalization="token", dtype=torch.float32)
    edit.prepare(tokens.device, tokens.dtype)
    with torch.no_grad(), Allocations() as mode:
        edit(tokens, 0.7)
    assert len([size for size in mode.sizes if size >= tokens.nbytes]) == 1
    assert max(mode.sizes) == tokens.nbytes < width * width * 4
