"""SEA: its configuration, the projection of one layer, and the edit of a model."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch

import sealign
from sealign.edits.affine_edit import AffineEdit
from sealign.edits.feature_map_edit import FeatureMapEdit
from sealign.errors import ActivationError, DegenerateError, DemonstrationError, SettingError, SiteError
from sealign.fitting.activation_store import Keep
from sealign.fitting.edit_config import EditConfig
from sealign.methods.registry import fit_edit_from_activations
from sealign.methods.sea import SEAConfig, projection_edit
from sealign.models.prompt_format import PromptFormat
from sealign.models.sites import SITES, select_layers
from sealign.spectral.feature_maps import FEATURE_MAPS
from sealign.spectral.projection import COMBINES, NORMALIZATIONS
from sealign.spectral.signature import layer_signature
from tests.shapes import unchecked


def test_defaults() -> None:
    """The paper's settings, except that the edit is rescaled per token and fitted where it is applied."""
    assert SEAConfig().dump() == EditConfig().dump() | {
        "explained_variance": None,  # 0.998, unless a rank is given
        "rank": None,
        "centered": False,
        "feature_map": "identity",
        "site": "mlp",
        "fit_site": None,
        "layers": "last:21/32",
        "combine": "both",
        "shift": False,
        "normalization": "token",
        "strength": 1.0,
    }
    assert SEAConfig() == SEAConfig()
    assert SEAConfig().targets() == ({"explained_variance": 0.998}, {"explained_variance": 0.998})
    assert SEAConfig().read_site == "mlp"


def test_reference_is_the_released_code() -> None:
    reference, default = SEAConfig.reference().dump(), SEAConfig().dump()
    assert {name: value for name, value in reference.items() if value != default[name]} == {
        "explained_variance": 0.998,
        "fit_site": "residual",
        "normalization": "feature",
        "neutral": "generated",
        "max_new_tokens": 256,
        "prompt_format": default["prompt_format"] | {"style": "few_shot_chat"},
    }
    assert SEAConfig.reference().targets() == SEAConfig().targets()
    assert SEAConfig.reference().read_site == "residual"
    # The last 21 layers of the 32 of the paper's 7B models.
    assert select_layers(SEAConfig.reference().layers, 32) == list(range(11, 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"explained_variance": 0.0}, "explained_variance is 0.0, but it must be in (0, 1]; try 0.9"),
        ({"explained_variance": -0.1}, "explained_variance is -0.1, but it must be in (0, 1]"),
        ({"explained_variance": 1.0001}, "explained_variance is 1.0001, but it must be in (0, 1]"),
        ({"explained_variance": 99.8}, "explained_variance is 99.8, but it must be in (0, 1]"),
        ({"explained_variance": float("nan")}, "explained_variance is nan, but it must be"),
        ({"explained_variance": (0.9, 1.5)}, "explained_variance is 1.5, but it must be in (0, 1]"),
        ({"explained_variance": (2.0, 0.9)}, "explained_variance is 2.0, but it must be in (0, 1]"),
        ({"explained_variance": (0.9,)}, "explained_variance is (0.9,), but it must be a number or a sequence of 2"),
        ({"explained_variance": ()}, "explained_variance is (), but it must be a number or a sequence of 2 values"),
        ({"explained_variance": "most"}, "explained_variance is 'most', but it must be a number"),
        ({"rank": (1, 2, 3)}, "rank is (1, 2, 3), but it must be an integer or a sequence of 2 values"),
        ({"rank": 0}, "rank is 0, but it must be at least 1"),
        ({"rank": -3}, "rank is -3, but it must be at least 1"),
        ({"rank": (2, 0)}, "rank is 0, but it must be at least 1"),
        ({"rank": 2.5}, "rank is 2.5, but it must be an integer"),
        ({"rank": True}, "rank is True, but it must be an integer"),
        ({"rank": 3, "explained_variance": 0.9}, "rank is 3 and explained_variance is 0.9, but only one of them can"),
        ({"feature_map": "tahn"}, "unknown feature map 'tahn' (did you mean 'tanh'?); choose one of"),
        ({"combine": "averge"}, "unknown combination 'averge' (did you mean 'average'?); choose one"),
        ({"normalization": "tokens"}, "unknown normalization 'tokens' (did you mean 'token'?); choose"),
        ({"strength": float("inf")}, "strength is inf, but it must be finite"),
        ({"site": "mpl"}, "unknown site 'mpl' (did you mean 'mlp'?); choose one of: mlp, attention, resid"),
        ({"fit_site": "residul"}, "unknown fit site 'residul' (did you mean 'residual'?)"),
        ({"token": "first"}, "unknown token choice 'first'; choose one of: last, mean, completion, random"),
        ({"batch_size": "auto"}, "batch_size is 'auto', but it must be an integer"),
        ({"layers": "most"}, "layers is 'most', but it must be one of: all; last:L, first:L or signature:L"),
        ({"centerd": True}, "unknown SEAConfig setting 'centerd' (did you mean 'centered'?); choose one of: "),
        ({"centered": 1}, "centered is 1, but it must be True or False"),
        ({"shift": True, "feature_map": "elu"}, "shift is True and feature_map is 'elu', but a shift can only be"),
    ],
    ids=str,
)
def test_settings_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=re.escape(message)) as refusal:
        SEAConfig(**change)
    assert "\n" not in str(refusal.value)


def test_settings_have_names() -> None:
    message = "SEAConfig takes keyword arguments only; write SEAConfig(explained_variance=0.9)"
    with pytest.raises(SettingError, match=re.escape(message)):
        SEAConfig(0.9)  # type: ignore[misc, arg-type]
    with pytest.raises(SettingError, match=r"SEAConfig is frozen; make a changed copy with replace\(rank=3\)"):
        SEAConfig().rank = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "change",
    [
        *({"explained_variance": value} for value in (1, 1.0, 1e-9, (0.9, 1.0), [0.5, 0.25], np.float64(0.5))),
        *({"rank": value} for value in (1, 5000, (1, 7), [3, 2], np.int64(4), np.array([3, 2]))),
        *({"strength": value} for value in (0, -1.5, 3, np.float32(0.5))),
        *({"combine": value} for value in COMBINES),
        *({"normalization": value} for value in NORMALIZATIONS),
        *({"feature_map": value} for value in FEATURE_MAPS),
        *({"site": value} for value in SITES),
        *({"fit_site": value} for value in SITES),
        {"layers": [np.int64(3), np.int32(-1)]},
    ],
    ids=str,
)
def test_settings_at_their_bounds(change: dict[str, Any]) -> None:
    config = SEAConfig(**change)
    for name, value in change.items():
        expected = tuple(value) if isinstance(value, list | np.ndarray) else value
        assert getattr(config, name) == expected
        assert "numpy" not in type(getattr(config, name)).__module__
    assert SEAConfig(**json.loads(json.dumps(config.dump()))) == config
    assert SEAConfig().replace(**change) == config
    assert hash(config) == hash(SEAConfig(**change))


def test_a_changed_copy_is_checked() -> None:
    config = SEAConfig(rank=(3, 2), layers=[1])
    assert config.replace(rank=4) == SEAConfig(rank=4, layers=(1,))
    assert config.replace(rank=None, explained_variance=0.9) == SEAConfig(explained_variance=0.9, layers=(1,))
    with pytest.raises(SettingError, match="only one of them can decide"):
        config.replace(explained_variance=0.9)
    with pytest.raises(SettingError, match="rank is 0"):
        config.replace(rank=0)


def test_pairs() -> None:
    assert SEAConfig(explained_variance=0.9).targets() == ({"explained_variance": 0.9}, {"explained_variance": 0.9})
    assert SEAConfig(rank=(3, 2)).targets() == ({"rank": 3}, {"rank": 2})
    assert SEAConfig(rank=4).targets() == ({"rank": 4}, {"rank": 4})
    two = SEAConfig(explained_variance=[0.5, 0.25])  # type: ignore[arg-type]
    assert two.targets() == ({"explained_variance": 0.5}, {"explained_variance": 0.25})


def test_what_the_fit_passes_on(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    config = SEAConfig(
        site="attention",
        combine="negative",
        normalization="none",
        strength=2,
        feature_map="elu",
        centered=True,
        token="random",
        neutral="generated",
        max_new_tokens=5,
        prompt_format=PromptFormat("few_shot", "Be brief."),
        batch_size=3,
        seed=11,
        layers=[1],
        rank=2,
    )
    edit = sealign.fit_edit(llama, tokenizer, demonstrations, config=config)
    record = edit.record
    assert (record.site, record.normalization, record.strength) == ("attention", "none", 2.0)
    assert (record.feature_map, record.combine) == ("elu", "negative")
    assert isinstance(record.strength, float)
    assert isinstance(edit.layer_edits[1], FeatureMapEdit)
    assert "layers.1.mean" in edit.tensors()
    assert record.config == config.dump()
    assert config.statistics_settings() == (True, "elu")


def _matrices(n: int = 9, d: int = 14, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    mixing = torch.randn(3, d, dtype=torch.float64)
    return [
        (torch.randn(n, 3, dtype=torch.float64) @ mixing + 0.1 * torch.randn(n, d).double()).to(dtype) for _ in "123"
    ]


def test_projection_against_numpy() -> None:
    neutral, positive, negative = _matrices()
    projection = sealign.fit_projection(neutral, positive, negative, explained_variance=(0.9, 0.6), centered=True)
    x = (neutral - neutral.mean(0)).numpy()
    for target, factor, share in ((positive, projection.positive, 0.9), (negative, projection.negative, 0.6)):
        y = (target - target.mean(0)).numpy()
        vectors, values, _ = np.linalg.svd(x.T @ y / 9)
        k = int(np.searchsorted(np.cumsum(values**2) / (values**2).sum(), share)) + 1
        assert factor.shape == (14, k)
        np.testing.assert_allclose(factor @ factor.T, vectors[:, :k] @ vectors[:, :k].T, atol=1e-10)
    torch.testing.assert_close(projection.mean, neutral.mean(0))


def test_ranks_for_each_side_and_types() -> None:
    matrices = _matrices(dtype=torch.float32)
    projection = sealign.fit_projection(*matrices, rank=(3, 1))
    assert (projection.rank_positive, projection.rank_negative) == (3, 1)
    assert projection.positive.dtype == torch.float32
    assert sealign.fit_projection(*[m.bfloat16() for m in matrices], rank=2).positive.dtype == torch.float32
    assert sealign.fit_projection(*[m.double() for m in matrices], rank=2).negative.dtype == torch.float64


def test_float32_takes_the_decisions_of_float64() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        matrices = [matrix.float() for matrix in _matrices()]
        single = sealign.fit_projection(*matrices, explained_variance=0.97)
        double = sealign.fit_projection(*[matrix.double() for matrix in matrices], explained_variance=0.97)
        assert single.rank_positive == double.rank_positive
        torch.testing.assert_close(single.positive.double(), double.positive, rtol=0, atol=1e-6)


def test_inputs_are_not_changed() -> None:
    matrices = _matrices()
    copies = [matrix.clone() for matrix in matrices]
    sealign.fit_projection(*matrices, centered=True, feature_map="tanh")
    assert all(torch.equal(a, b) for a, b in zip(matrices, copies, strict=True))


def test_refusals() -> None:
    neutral, positive, negative = _matrices()
    with unchecked(), pytest.raises(ActivationError, match=r"three \(n, d\) matrices of one shape"):
        sealign.fit_projection(neutral, positive[:-1], negative)
    with pytest.raises(ActivationError, match="1 demonstrations, but a fit needs at least 2"):
        sealign.fit_projection(neutral[:1], positive[:1], negative[:1])
    positive[4, 2] = float("inf")
    with pytest.raises(ActivationError, match="row 4 of the positive activations"):
        sealign.fit_projection(neutral, positive, negative)
    zero = torch.zeros_like(neutral)
    with pytest.raises(DegenerateError, match="neutral and negative activations: the cross-covariance is zero"):
        sealign.fit_projection(neutral, neutral, zero)
    with pytest.raises(SettingError, match=r"rank is 15, but it must be in \[1, 14\]"):
        sealign.fit_projection(neutral, neutral, neutral, rank=15)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("centered", [False, True])
def test_a_projection_as_an_affine_edit(combine: Any, normalization: Any, centered: bool) -> None:
    """In float64, against the projection itself, which is tested against the paper's formulas."""
    matrices = _matrices()
    projection = sealign.fit_projection(*matrices, rank=(3, 2), centered=centered)
    edit = projection_edit(projection, combine=combine, normalization=normalization)
    assert isinstance(edit, AffineEdit)
    tokens = torch.randn(6, 14, dtype=torch.float64)
    for strength in (0.3, 1.0, -2.0):
        expected = projection(tokens, combine=combine, normalization=normalization, strength=strength)
        torch.testing.assert_close(edit(tokens, strength), expected, rtol=1e-10, atol=1e-10)
    # As many directions as the combination uses, and no more.
    sides = {"positive": (3,), "negative": (2,)}.get(combine, (3, 2))
    assert (edit.rank, edit.groups) == (sum(sides), sides)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("normalization", ["token", "none"])
@pytest.mark.parametrize("centered", [False, True])
def test_a_shift_moves_the_mean(combine: Any, normalization: Any, centered: bool) -> None:
    """Against the formula in float64: each side that is used adds half of the difference of the means."""
    neutral, positive, negative = (matrix.numpy() for matrix in _matrices())
    projection = sealign.fit_projection(
        *(torch.from_numpy(each) for each in (neutral, positive, negative)), rank=(3, 2), centered=centered
    )
    delta = positive.mean(0) - negative.mean(0)
    edit = projection_edit(projection, combine=combine, difference=torch.from_numpy(delta), normalization=normalization)
    mean = neutral.mean(0) if centered else np.zeros(14)
    keep, drop = (factor.numpy() @ factor.numpy().T for factor in (projection.positive, projection.negative))
    x = np.random.default_rng(0).normal(size=(6, 14))
    z = x - mean
    y = {
        "both": x + z @ keep - z @ drop + delta,
        "positive": mean + z @ keep + delta / 2,
        "negative": x - z @ drop + delta / 2,
        "average": mean + (z @ keep + z - z @ drop) / 2 + delta / 2,
        "reversed": x - z @ keep + z @ drop - delta,
    }[combine]
    if normalization == "token":
        y *= np.linalg.norm(x, axis=1, keepdims=True) / np.linalg.norm(y, axis=1, keepdims=True)
    for strength in (0.3, -2.0):
        found = edit(torch.from_numpy(x), strength).numpy()
        np.testing.assert_allclose(found, x + strength * (y - x), rtol=1e-10, atol=1e-10)


def test_a_shift_needs_a_linear_edit() -> None:
    projection = sealign.fit_projection(*_matrices(), rank=2, feature_map="tanh")
    with pytest.raises(SettingError, match="difference is given with the feature map 'tanh'"):
        projection_edit(projection, difference=torch.ones(14, dtype=torch.float64))


def test_the_fit_adds_the_difference_of_the_means(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    config = SEAConfig(layers=[1, 2], rank=(3, 2), centered=True, shift=True, token="completion", normalization="none")
    rows = sealign.collect_activations(llama, tokenizer, demonstrations, config=config.collect_config())
    edit = sealign.fit_edit(llama, tokenizer, demonstrations, config=config)
    plain = sealign.fit_edit(llama, tokenizer, demonstrations, config=config.replace(shift=False))
    for layer in (1, 2):
        difference = (rows.positive[layer].double() - rows.negative[layer].double()).mean(0)
        mean = rows.neutral[layer].double().mean(0)
        moved = edit.layer_edits[layer](mean[None])[0] - mean
        torch.testing.assert_close(moved, difference, rtol=1e-4, atol=1e-7)
        still = plain.layer_edits[layer](mean[None])[0] - mean
        assert float(still.norm()) < 1e-5 * float(mean.norm())


def test_a_projection_with_a_feature_map_stays_one() -> None:
    projection = sealign.fit_projection(*_matrices(), rank=2, feature_map="tanh")
    edit = projection_edit(projection, combine="positive", normalization="token")
    assert isinstance(edit, FeatureMapEdit)
    tokens = torch.randn(6, 14, dtype=torch.float64)
    expected = projection(tokens, combine="positive", normalization="token", strength=0.5)
    torch.testing.assert_close(edit(tokens, 0.5), expected)


def test_edit_reports_what_it_touches(small_edit: sealign.Edit) -> None:
    assert small_edit.layers == [1, 3]
    assert small_edit.modules == ["model.layers.1.mlp", "model.layers.3.mlp"]
    for layer in small_edit.layers:
        entry = small_edit.record.layers[str(layer)]
        figures = entry.statistics
        assert (entry.rank, entry.groups) == (5, (3, 2))
        assert 0 < figures["explained_variance_positive"] <= 1
        assert 0 < figures["explained_variance_negative"] <= 1
        assert entry.relative_change > 0
        assert figures["signature"] > 0
    assert small_edit.record.demonstrations_count == 7
    assert small_edit.record.config["strength"] == 0.7
    assert small_edit.record.versions.keys() == {"sealign", "torch", "transformers", "python"}


def test_fit_is_collection_then_projections(
    small_edit: sealign.Edit, llama: Any, tokenizer: Any, demonstrations: Any
) -> None:
    collected = sealign.collect_activations(llama, tokenizer, demonstrations, layers=[1, 3])
    for layer in (1, 3):
        expected = sealign.fit_projection(*collected.rows(layer), rank=(3, 2))
        x = collected.neutral[layer]
        torch.testing.assert_close(small_edit.layer_edits[layer](x), expected(x), rtol=1e-4, atol=1e-4)
        found = small_edit.affine_edits[layer]
        torch.testing.assert_close(found.right[:3].T, expected.positive, rtol=1e-4, atol=1e-4)
        change = ((expected(x, strength=0.7) - x).norm(dim=1) / x.norm(dim=1)).mean()
        assert small_edit.record.layers[str(layer)].relative_change == pytest.approx(float(change), rel=1e-3)


def test_two_fits_are_equal_to_the_bit(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    config = SEAConfig(layers="all", token="random", neutral="generated", max_new_tokens=3, seed=5)
    first, second = (sealign.fit_edit(llama, tokenizer, demonstrations, config=config) for _ in range(2))
    assert first.hash == second.hash
    assert first.record.layers == second.record.layers
    assert first.record.tensors_hash == second.record.tensors_hash


def test_fitting_and_editing_sites_may_differ(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    config = SEAConfig(site="mlp", fit_site="residual", layers=(2,), rank=2)
    edit = sealign.fit_edit(llama, tokenizer, demonstrations, config=config)
    assert edit.modules == ["model.layers.2.mlp"]
    residual = sealign.collect_activations(llama, tokenizer, demonstrations, site="residual", layers=[2])
    expected = sealign.fit_projection(*residual.rows(2), rank=2)
    torch.testing.assert_close(edit.affine_edits[2].right[:2].T, expected.positive, rtol=1e-4, atol=1e-4)
    mlp = sealign.collect_activations(llama, tokenizer, demonstrations, site="mlp", layers=[2]).neutral[2]
    change = ((expected(mlp) - mlp).norm(dim=1) / mlp.norm(dim=1)).mean()
    assert edit.record.layers["2"].relative_change == pytest.approx(float(change), rel=1e-3)


def test_layers_by_signature(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    collected = sealign.collect_activations(llama, tokenizer, demonstrations)
    for centered in (False, True):
        signatures = {
            layer: layer_signature(collected.positive[layer], collected.negative[layer], centered=centered)
            for layer in collected.layers
        }
        best = sorted(sorted(signatures, key=lambda layer: signatures[layer])[-2:])
        config = SEAConfig(layers="signature:2", rank=2, centered=centered)
        edit = sealign.fit_edit(llama, tokenizer, demonstrations, config=config)
        assert edit.layers == best
        for layer in best:
            found = edit.record.layers[str(layer)].statistics["signature"]
            assert found == pytest.approx(signatures[layer], rel=1e-6)


def test_several_behaviours_together(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    """A joint edit is the edit of the pooled demonstrations: its covariance is the weighted mean of theirs."""
    config = SEAConfig(layers=(1,), rank=1)
    parts = demonstrations[:3], demonstrations[3:]
    collected = [sealign.collect_activations(llama, tokenizer, part, layers=[1]) for part in parts]
    joint = sealign.fit_edit(llama, tokenizer, [*parts[0], *parts[1]], config=config)
    omega = sum(c.neutral[1].double().T @ c.positive[1].double() for c in collected) / 7
    vector = torch.linalg.svd(omega)[0][:, 0]
    assert abs(float(vector @ joint.affine_edits[1].right[0].double())) == pytest.approx(1, abs=1e-5)


def test_reference_configuration_runs(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    config = SEAConfig.reference().replace(max_new_tokens=4, prompt_format=sealign.PromptFormat("chat"))
    edit = sealign.fit_edit(llama, tokenizer, demonstrations, config=config)
    assert edit.layers == [1, 2, 3]  # 21 of 32 in proportion to a depth of 4
    assert edit.normalization == "feature"
    assert not edit.is_causal


def test_module_pattern_is_used_for_fitting_and_editing(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    config = SEAConfig(layers=(1, 2), module_pattern="model.layers.{layer}.self_attn.o_proj", rank=2)
    edit = sealign.fit_edit(llama, tokenizer, demonstrations, config=config)
    assert edit.modules == [f"model.layers.{layer}.self_attn.o_proj" for layer in (1, 2)]
    by_site = sealign.fit_edit(
        llama, tokenizer, demonstrations, config=SEAConfig(layers=(1, 2), site="attention", rank=2)
    )
    torch.testing.assert_close(edit.affine_edits[1].right, by_site.affine_edits[1].right, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_fitted_fails_before_anything_runs(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    calls: list[int] = []
    hook = llama.model.register_forward_pre_hook(lambda *_: calls.append(1))
    refused: list[tuple[type[Exception], dict[str, Any], str]] = [
        (SiteError, {"layers": (1, 9), "fit_site": "residual"}, "layer 9 is outside the model"),
        (SiteError, {"layers": "signature:5"}, "selects 5 layers, but the model has 4"),
        (SettingError, {"rank": (2, 49)}, r"rank is 49, but it must be in \[1, 48\]"),
        (DegenerateError, {"rank": 8}, "rank is 8, but 7 demonstrations have at most 7 directions; lower the rank"),
        (DegenerateError, {"rank": 7, "centered": True}, "7 centred demonstrations have at most 6 directions"),
    ]
    for error, settings, message in refused:
        with pytest.raises(error, match=message):
            sealign.fit_edit(llama, tokenizer, demonstrations, config=SEAConfig(**settings))
    with pytest.raises(DegenerateError, match="rank is 9, but 7 demonstrations have at most 7 directions"):
        sealign.fit_edit(llama, tokenizer, demonstrations, config=sealign.DifferenceOperatorConfig(rank=9))
    with pytest.raises(DemonstrationError, match="1 demonstrations, but sea needs at least 2"):
        sealign.fit_edit(llama, tokenizer, demonstrations[:1])
    hook.remove()
    assert calls == []


def test_degenerate_layers_are_named(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    twice = demonstrations * 2
    collected = sealign.collect_activations(llama, tokenizer, twice, layers=[2])
    with pytest.raises(DegenerateError, match=r"layer 2: .*only 7 singular values"):
        fit_edit_from_activations(llama, tokenizer, collected, twice, config=SEAConfig(rank=10, layers=[2]))


@pytest.mark.parametrize("kept", ["rows", "sums"])
@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("layers", ["all", "signature:2"])
def test_what_is_kept_and_where_makes_no_difference(
    kept: Any, place: Any, layers: str, llama: Any, tokenizer: Any, demonstrations: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("sealign.fitting.collected.CHUNK", 3)
    monkeypatch.setattr("sealign.fitting.layer_statistics.ROWS_AT_A_TIME", 3)
    config = SEAConfig(layers=layers, rank=(3, 2), centered=True, token="random")
    expected = sealign.fit_edit(llama, tokenizer, demonstrations, config=config)
    found = sealign.fit_edit(llama, tokenizer, demonstrations, config=config, keep=Keep(kept, place))
    assert found.layers == expected.layers
    identity = torch.eye(expected.width, dtype=torch.float64)
    for layer, other in expected.affine_edits.items():
        own = found.affine_edits[layer]
        for left, right in ((own.right[:3], other.right[:3]), (own.right[3:], other.right[3:])):
            torch.testing.assert_close(left.T @ left, right.T @ right, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(own.linear_part(identity), other.linear_part(identity), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(own.center, other.center)
        records = [edit.record.layers[str(layer)] for edit in (found, expected)]
        assert records[0].relative_change == pytest.approx(records[1].relative_change, rel=1e-3)
        assert records[0].statistics == pytest.approx(records[1].statistics, rel=1e-4)
