from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sealign.errors import SettingError
from sealign.spectral.feature_maps import EPSILON, FEATURE_MAPS, get_feature_map

RANGES = {"identity": 50.0, "squared_exponential": 4.0, "tanh": 4.0, "elu": 8.0}
"""Where each map is invertible in float64 without meeting its clip."""


@pytest.mark.parametrize("name", FEATURE_MAPS)
@given(share=st.floats(-1, 1))
def test_inverse_undoes_the_map(name: str, share: float) -> None:
    x = torch.tensor([share * RANGES[name]], dtype=torch.float64)
    phi = get_feature_map(name)
    assert torch.allclose(phi.inverse(phi.forward(x), x), x, atol=1e-6)


def test_values_against_the_formulas() -> None:
    x = torch.tensor([-1.3, 0.0, 0.7], dtype=torch.float64)
    assert get_feature_map("squared_exponential").forward(x).tolist() == pytest.approx(
        [math.exp(-v * v / 2) for v in x.tolist()]
    )
    assert get_feature_map("tanh").forward(x).tolist() == pytest.approx([math.tanh(v) for v in x.tolist()])
    assert get_feature_map("elu").forward(x).tolist() == pytest.approx([math.exp(-1.3) - 1, 0.0, 0.7])


def test_inverses_clip_at_the_ends_of_their_domains() -> None:
    x = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    low = math.sqrt(-2 * math.log(EPSILON))
    assert get_feature_map("squared_exponential").inverse(torch.zeros(2).double(), x).tolist() == pytest.approx(
        [-low, low]
    )
    assert get_feature_map("squared_exponential").inverse(torch.full((2,), 3.0).double(), x).abs().max() == 0
    assert get_feature_map("tanh").inverse(2 * x, x).tolist() == pytest.approx(
        [math.atanh(EPSILON - 1), math.atanh(1 - EPSILON)]
    )
    assert get_feature_map("elu").inverse(-2 * x.abs(), x).tolist() == pytest.approx([math.log(EPSILON)] * 2)


def test_the_even_map_takes_its_sign_from_the_activation() -> None:
    phi = get_feature_map("squared_exponential")
    y = torch.tensor([0.5, 0.5])
    assert phi.inverse(y, torch.tensor([2.0, -2.0])).sign().tolist() == [1, -1]


def test_unknown_map_is_refused_with_a_suggestion() -> None:
    with pytest.raises(SettingError, match="unknown feature map 'tahn' \\(did you mean 'tanh'"):
        get_feature_map("tahn")
