from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sealign.errors import ActivationError, NormalizationError, SettingError
from sealign.spectral.feature_maps import FEATURE_MAPS
from sealign.spectral.projection import COMBINES, NORMALIZATIONS, Combine, Normalization, Projection


def make_projection(
    d: int = 11,
    ranks: tuple[int, int] = (3, 2),
    *,
    seed: int = 0,
    centered: bool = False,
    feature_map: str = "identity",
) -> Projection:
    generator = torch.Generator().manual_seed(seed)

    def basis(k: int) -> torch.Tensor:
        columns: torch.Tensor = torch.linalg.qr(torch.randn(d, k, dtype=torch.float64, generator=generator))[0]
        return columns

    mean = torch.rand(d, dtype=torch.float64, generator=generator) * 0.5 if centered else None
    return Projection(basis(ranks[0]), basis(ranks[1]), mean, feature_map)


def dense_edit(projection: Projection, x: np.ndarray, combine: str, normalization: str, strength: float) -> np.ndarray:
    """The definition with dense (d, d) projections in float64."""
    d = projection.width
    plus = projection.positive.numpy() @ projection.positive.numpy().T
    minus = projection.negative.numpy() @ projection.negative.numpy().T
    if combine == "reversed":
        plus, minus = minus, plus
    mu = np.zeros(d) if projection.mean is None else projection.mean.numpy()
    phi = FEATURE_MAPS[projection.feature_map]

    def forward(v: np.ndarray) -> np.ndarray:
        return phi.forward(torch.tensor(v)).numpy()

    def inverse(v: np.ndarray) -> np.ndarray:
        return phi.inverse(torch.tensor(v), torch.tensor(x)).numpy()

    z = forward(x) - mu
    kept = inverse(mu + z @ plus)
    dropped = inverse(mu + z @ (np.eye(d) - minus))
    origin = inverse(np.broadcast_to(mu, x.shape).copy()) if projection.mean is not None else 0
    y = {
        "both": kept + dropped - origin,
        "reversed": kept + dropped - origin,
        "positive": kept,
        "negative": dropped,
        "average": (kept + dropped) / 2,
    }[combine]
    if normalization != "none":
        axis = -1 if normalization == "token" else -2
        y = y * np.linalg.norm(x, axis=axis, keepdims=True) / np.linalg.norm(y, axis=axis, keepdims=True)
    edited: np.ndarray = x + strength * (y - x)
    return edited


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_against_the_dense_definition(
    feature_map: str, centered: bool, combine: Combine, normalization: Normalization
) -> None:
    projection = make_projection(centered=centered, feature_map=feature_map)
    x = torch.randn(2, 5, 11, dtype=torch.float64)
    edited = projection(x, combine=combine, normalization=normalization, strength=0.4)
    np.testing.assert_allclose(
        edited.numpy(), dense_edit(projection, x.numpy(), combine, normalization, 0.4), rtol=1e-8, atol=1e-8
    )


@settings(max_examples=40, deadline=None)
@given(
    combine=st.sampled_from(COMBINES),
    normalization=st.sampled_from(["token", "none"]),
    strength=st.floats(-2, 2),
    seed=st.integers(0, 20),
)
def test_a_token_does_not_depend_on_the_others(
    combine: Combine, normalization: Normalization, strength: float, seed: int
) -> None:
    projection = make_projection(seed=seed, centered=True)
    x = torch.randn(3, 4, 11, dtype=torch.float64)
    together = projection(x, combine=combine, normalization=normalization, strength=strength)
    alone = projection(x[1, 2], combine=combine, normalization=normalization, strength=strength)
    torch.testing.assert_close(together[1, 2], alone)


def test_token_rescaling_keeps_norms() -> None:
    x = torch.randn(6, 11)
    edited = make_projection()(x, normalization="token")
    torch.testing.assert_close(edited.norm(dim=-1), x.norm(dim=-1))


def test_feature_rescaling_keeps_feature_norms() -> None:
    x = torch.randn(6, 11)
    edited = make_projection()(x, normalization="feature")
    torch.testing.assert_close(edited.norm(dim=0), x.norm(dim=0))


def test_strength_zero_is_the_same_tensor_and_strength_is_linear() -> None:
    projection, x = make_projection(), torch.randn(4, 11, dtype=torch.float64)
    assert projection(x, strength=0) is x
    whole = projection(x, strength=1.0)
    torch.testing.assert_close(projection(x, strength=0.3), x + 0.3 * (whole - x))


def test_input_is_never_changed() -> None:
    x = torch.randn(4, 11)
    before = x.clone()
    for combine in COMBINES:
        for normalization in NORMALIZATIONS:
            make_projection(centered=True)(x, combine=combine, normalization=normalization)
    assert torch.equal(x, before)


def test_zero_vectors_stay_finite() -> None:
    x = torch.zeros(3, 11)
    assert torch.equal(make_projection()(x), x)
    # A vector that the edit removes altogether has no direction to rescale.
    projection = make_projection(ranks=(1, 1))
    along = projection.negative[:, 0][None]
    removed = projection(along, combine="negative")
    assert bool(torch.isfinite(removed).all())
    assert float(removed.norm()) < 1e-6 or float(removed.norm()) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    projection, x = make_projection(), torch.randn(5, 11).to(dtype)
    edited = projection(x, strength=0.5)
    assert edited.dtype == dtype
    assert torch.equal(edited, projection(x.float(), strength=0.5).to(dtype))


def test_gradients_flow() -> None:
    projection = make_projection()
    x = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: projection(t, strength=0.6), (x,))


def test_reversed_exchanges_the_factors() -> None:
    projection = make_projection(ranks=(4, 2), centered=True)
    other, x = projection.reversed(), torch.randn(3, 11, dtype=torch.float64)
    assert (other.rank_positive, other.rank_negative) == (2, 4)
    torch.testing.assert_close(other(x), projection(x, combine="reversed"))


def test_refusals() -> None:
    projection, x = make_projection(), torch.randn(4, 11)
    with pytest.raises(SettingError, match=r"unknown combination 'bth' \(did you mean 'both'"):
        projection(x, combine="bth")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="unknown normalization 'tokens'"):
        projection(x, normalization="tokens")  # type: ignore[arg-type]
    with pytest.raises(ActivationError, match="the tokens have 7 features, but the projection has 11; use"):
        projection(torch.randn(4, 7))
    with pytest.raises(NormalizationError, match=r"needs a \(tokens, d\) tensor, got a single"):
        projection(torch.randn(11), normalization="feature")
