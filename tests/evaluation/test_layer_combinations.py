"""Combinations of layers: weights of largest efficiency, and edits that are the weighted sum of their parts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import sealign
from sealign.errors import SettingError
from sealign.evaluation.candidates import Candidate, combine
from sealign.evaluation.layer_combinations import LAYERS, combinations
from sealign.evaluation.scan import scan
from sealign.evaluation.strength_choice import DamageTexts
from sealign.fitting.edit_config import EditConfig


def _candidates(llama: Any, tokenizer: Any, demonstrations: Any, config: EditConfig) -> list[Candidate]:
    edit = sealign.fit_edit(llama, tokenizer, demonstrations, config=config)
    parts = [config.replace(layers=(layer,)) for layer in edit.layers]
    return [Candidate(part, edit.with_layers(part.layers)) for part in parts]  # type: ignore[arg-type]


@pytest.fixture
def candidates(llama: Any, tokenizer: Any, demonstrations: Any) -> list[Candidate]:
    config = sealign.MeanDifferenceConfig(site="mlp", layers="all", normalization="none")
    return _candidates(llama, tokenizer, demonstrations, config)


def test_weights_are_those_of_the_largest_efficiency(candidates: list[Candidate]) -> None:
    """With a curvature that is nearly diagonal, w_l = g_l / A_l, and squared efficiencies add."""
    g = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64)
    sizes = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    (found,) = combinations(candidates, g.repeat(5, 1), torch.diag(sizes))
    assert found.members == [2, 0, 3]  # by efficiency; the layer that harms is left out
    expected = (g / sizes.square())[found.members]
    torch.testing.assert_close(found.weights, expected / expected.max())
    weighted = g[found.members] @ found.weights
    curvature = (torch.diag(sizes)[:, found.members] @ found.weights).square().sum()
    squares = float((g / sizes).square()[found.members].sum())
    assert float(weighted / curvature.sqrt()) == pytest.approx(math.sqrt(squares))
    assert found.candidate.edit.layers == [0, 2, 3]
    assert found.candidate.config.layers == (0, 2, 3)
    given = dict(zip(found.members, found.weights.tolist(), strict=True))
    assert found.candidate.config.layer_weights == pytest.approx((given[0], given[2], given[3]))
    assert f"0 (x {given[0]:.2f})" in found.candidate.describe()


def test_alike_layers_are_not_added_twice(candidates: list[Candidate]) -> None:
    """Two layers with the same derivatives are one; the second would have a negative or no weight of its own."""
    g = torch.tensor([1.0, 0.2, -1.0, -1.0], dtype=torch.float64)
    draws = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.1, 1.0, 1.0]], dtype=torch.float64)
    assert not list(combinations(candidates, g.repeat(3, 1), draws))


def test_the_number_of_layers_is_limited(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    config = sealign.MeanDifferenceConfig(site="residual", layers="all", normalization="none")
    first = _candidates(llama, tokenizer, demonstrations, config)
    many = [*first, *first]  # the members are chosen by index, so repeated layers are eight candidates here
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sealign.evaluation.layer_combinations.combine", lambda chosen, _: chosen[0])
        (found,) = combinations(many, torch.ones(3, 8, dtype=torch.float64), torch.eye(8, dtype=torch.float64))
    assert len(found.members) == LAYERS


def test_rescaled_and_nonlinear_edits_are_left_out(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    for config in (
        sealign.SEAConfig(layers="all"),
        sealign.SEAConfig(layers="all", feature_map="tanh", normalization="none"),
    ):
        found = _candidates(llama, tokenizer, demonstrations, config)
        gains = torch.ones(3, len(found), dtype=torch.float64)
        assert not list(combinations(found, gains, torch.eye(len(found), dtype=torch.float64)))


@pytest.mark.parametrize("method", [sealign.MeanDifferenceConfig, sealign.DifferenceOperatorConfig])
def test_a_combination_is_fitted_again_from_its_configuration(
    method: Any, llama: Any, tokenizer: Any, demonstrations: Any
) -> None:
    config = method(site="mlp", layers="all", normalization="none")
    parts = _candidates(llama, tokenizer, demonstrations, config)
    found = combine([parts[2], parts[0]], [0.25, 1.0])
    again = sealign.fit_edit(llama, tokenizer, demonstrations, config=found.config)
    assert again.hash == found.edit.hash
    for layer, weight in ((0, 1.0), (2, 0.25)):
        torch.testing.assert_close(
            again.affine_edits[layer].linear_part(torch.eye(again.width)),
            weight * parts[layer].edit.affine_edits[layer].linear_part(torch.eye(again.width)),
        )
        ours, theirs = again.record.layers[str(layer)], parts[layer].edit.record.layers[str(layer)]
        assert ours.relative_change == pytest.approx(weight * theirs.relative_change, rel=1e-4)


def test_the_scan_adds_derivatives(
    candidates: list[Candidate], llama: Any, tokenizer: Any, demonstrations: Any
) -> None:
    """A combination that is scanned as a candidate of its own has the same figures as from its parts."""
    texts = DamageTexts.of(
        llama, tokenizer, demonstrations[:3], texts=4 * ["The river was cold and the old clock stood. " * 3]
    )
    found = scan(llama, tokenizer, candidates, demonstrations, texts)
    joined = [each for each in found if each.candidate.config.layer_weights is not None]
    for each in joined:
        (alone,) = scan(llama, tokenizer, [each.candidate], demonstrations, texts)
        assert alone.gain == pytest.approx(each.gain, rel=1e-3)
        assert alone.gain_error == pytest.approx(each.gain_error, rel=1e-3)
        assert alone.domain == pytest.approx(each.domain, rel=1e-3)
        assert alone.loss == pytest.approx(each.loss, rel=1e-3)
    assert joined
    assert any(each.loss for each in joined)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (0, 1), "layer_weights": (1.0,)}, "layer_weights has 1 numbers, but 2 layers are chosen"),
        ({"layer_weights": "0.5,x"}, "layer_weights is '0.5,x', but it must be numbers such as 0.5,1"),
        ({"layer_weights": (math.inf,)}, "layer_weights is inf, but it must be finite"),
        (
            {"layers": (1,), "layer_weights": "2", "normalization": "token"},
            "the edit is rescaled .* cannot be multiplied",
        ),
    ],
)
def test_weights_that_are_refused(
    settings: dict[str, Any], message: str, llama: Any, tokenizer: Any, demonstrations: Any
) -> None:
    with pytest.raises(SettingError, match=message):
        sealign.fit_edit(llama, tokenizer, demonstrations, config=sealign.MeanDifferenceConfig(**settings))
