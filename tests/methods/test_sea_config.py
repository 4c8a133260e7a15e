from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sealign.methods.sea_config import FitConfig

from sealign.edits.record import EditSettings
from sealign.errors import SealignError, SettingError, SiteError
from sealign.fitting.collect_config import CollectConfig
from sealign.models.prompt_format import PromptFormat
from sealign.models.sites import SITES, select_layers
from sealign.spectral.feature_maps import FEATURE_MAPS
from sealign.spectral.projection import COMBINES, NORMALIZATIONS

depths = st.integers(1, 80)
properties = settings(max_examples=80, deadline=None, derandomize=True)


def test_defaults() -> None:
    """The paper's settings, except that the edit is rescaled per token and fitted where it is applied."""
    config = FitConfig()
    assert dataclasses.asdict(config) == {
        "explained_variance": 0.998,
        "rank": None,
        "centered": False,
        "feature_map": "identity",
        "site": "mlp",
        "fit_site": None,
        "layers": "last:21/32",
        "module_pattern": None,
        "combine": "both",
        "normalization": "token",
        "strength": 1.0,
        "token": "last",
        "neutral": "prompt",
        "max_new_tokens": 32,
        "prompt_format": {"style": "auto", "preamble": None},
        "batch_size": 16,
        "seed": 0,
    }
    assert config == FitConfig()


def test_reference_is_the_released_code() -> None:
    changed = {
        field.name: getattr(FitConfig.reference(), field.name)
        for field in dataclasses.fields(FitConfig)
        if getattr(FitConfig.reference(), field.name) != getattr(FitConfig(), field.name)
    }
    assert changed == {
        "fit_site": "residual",
        "normalization": "feature",
        "neutral": "generated",
        "max_new_tokens": 256,
        "prompt_format": PromptFormat("few_shot_chat"),
    }
    assert FitConfig.reference().explained_variance == 0.998
    # The last 21 layers of the 32 of the paper's 7B models.
    assert select_layers(FitConfig.reference().layers, 32) == list(range(11, 32))


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FitConfig().strength = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"explained_variance": 0.0}, SettingError, "explained_variance is 0.0, but it must be in (0, 1]; try 0.9"),
        ({"explained_variance": -0.1}, SettingError, "explained_variance is -0.1, but it must be in (0, 1]"),
        ({"explained_variance": 1.0001}, SettingError, "explained_variance is 1.0001, but it must be in (0, 1]"),
        ({"explained_variance": 99.8}, SettingError, "explained_variance is 99.8, but it must be in (0, 1]"),
        ({"explained_variance": float("nan")}, SettingError, "explained_variance is nan, but it must be in (0, 1]"),
        ({"explained_variance": (0.9, 1.5)}, SettingError, "explained_variance is 1.5, but it must be in (0, 1]"),
        ({"explained_variance": (2.0, 0.9)}, SettingError, "explained_variance is 2.0, but it must be in (0, 1]"),
        ({"explained_variance": (0.9,)}, SettingError, "explained_variance is (0.9,), but it must be one value or a p"),
        ({"explained_variance": ()}, SettingError, "explained_variance is (), but it must be one value or a pair"),
        ({"rank": (1, 2, 3)}, SettingError, "rank is (1, 2, 3), but it must be one value or a pair (positive, nega"),
        ({"rank": 0}, SettingError, "rank is 0, but it must be at least 1 and at most the model's width"),
        ({"rank": -3}, SettingError, "rank is -3, but it must be at least 1"),
        ({"rank": (2, 0)}, SettingError, "rank is 0, but it must be at least 1"),
        ({"feature_map": "tahn"}, SettingError, "unknown feature map 'tahn' (did you mean 'tanh'?); choose one of"),
        ({"combine": "averge"}, SettingError, "unknown combination 'averge' (did you mean 'average'?); choose one"),
        ({"normalization": "tokens"}, SettingError, "unknown normalization 'tokens' (did you mean 'token'?); choose"),
        ({"strength": float("inf")}, SettingError, "strength is inf, but it must be finite; try a value in [0, 1]"),
        ({"strength": float("nan")}, SettingError, "strength is nan, but it must be finite"),
        ({"site": "mpl"}, SiteError, "unknown site 'mpl' (did you mean 'mlp'?); choose one of: mlp, attention, resid"),
        ({"fit_site": "residul"}, SiteError, "unknown site 'residul' (did you mean 'residual'?)"),
        ({"token": "first"}, SettingError, "unknown token choice 'first'; choose one of: last, mean, random"),
        ({"token": "men"}, SettingError, "unknown token choice 'men' (did you mean 'mean'?)"),
        ({"neutral": "promt"}, SettingError, "unknown neutral choice 'promt' (did you mean 'prompt'?); choose one of"),
        ({"batch_size": 0}, SettingError, "batch_size is 0, but it must be at least 1"),
        ({"max_new_tokens": -1}, SettingError, "max_new_tokens is -1, but it must be at least 1"),
        ({"layers": ()}, SettingError, "layers is empty; name at least one layer, or 'all'"),
        ({"layers": []}, SettingError, "layers is empty; name at least one layer, or 'all'"),
        ({"layers": "most"}, SettingError, "layers is 'most', but it must be all, last:L, first:L, signature:L"),
    ],
)
def test_settings_that_are_refused(change: dict[str, Any], error: type[SealignError], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        FitConfig(**change)


@pytest.mark.parametrize(
    "change",
    [
        *({"explained_variance": value} for value in (1, 1.0, 1e-9, (0.9, 1.0), [0.5, 0.25])),
        *({"rank": value} for value in (1, 5000, (1, 7), [3, 2])),
        *({"strength": value} for value in (0, -1.5, 3)),
        *({"combine": value} for value in COMBINES),
        *({"normalization": value} for value in NORMALIZATIONS),
        *({"feature_map": value} for value in FEATURE_MAPS),
        *({"site": value} for value in SITES),
        *({"fit_site": value} for value in SITES),
        *({"token": value} for value in ("last", "mean", "random")),
        *({"neutral": value} for value in ("prompt", "generated")),
        {"batch_size": 1, "max_new_tokens": 1},
    ],
    ids=str,
)
def test_settings_at_their_bounds(change: dict[str, Any]) -> None:
    config = FitConfig(**change)
    assert {name: getattr(config, name) for name in change} == change


def test_pairs() -> None:
    config = FitConfig(explained_variance=0.9, rank=(3, 2))
    assert config.targets("explained_variance") == (0.9, 0.9)
    assert config.targets("rank") == (3, 2)
    assert FitConfig(explained_variance=[0.5, 0.25]).targets("explained_variance") == (0.5, 0.25)  # type: ignore[arg-type]
    assert FitConfig().targets("rank") == (None, None)


def test_what_the_fit_passes_on() -> None:
    written = PromptFormat("few_shot", "Be brief.")
    config = FitConfig(
        site="attention",
        combine="negative",
        normalization="none",
        strength=2,
        feature_map="elu",
        centered=True,
        token="random",
        neutral="generated",
        max_new_tokens=5,
        prompt_format=written,
        batch_size=3,
        seed=11,
    )
    assert config.settings() == EditSettings("attention", "negative", "none", 2.0, "elu", True)
    assert isinstance(config.settings().strength, float)
    assert config.collect_config() == CollectConfig("random", "generated", 5, written, 3, 11)


@properties
@given(depth=depths, data=st.data())
def test_last_and_first(depth: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, depth))
    everything = list(range(depth))
    assert select_layers(f"last:{count}", depth) == everything[-count:]
    assert select_layers(f"first:{count}", depth) == everything[:count]
    assert select_layers("all", depth) == everything


@properties
@given(depth=depths, below=st.integers(1, 40), data=st.data(), kind=st.sampled_from(["last", "first"]))
def test_shares_take_the_nearest_number_of_layers(depth: int, below: int, data: st.DataObject, kind: str) -> None:
    above = data.draw(st.integers(1, below))
    layers = select_layers(f"{kind}:{above}/{below}", depth)
    exact = Fraction(above, below) * depth
    assert len(layers) == 1 or abs(len(layers) - exact) <= Fraction(1, 2)
    assert len(layers) > 1 or exact <= Fraction(3, 2)
    assert layers == select_layers(f"{kind}:{len(layers)}", depth)


def test_shares_of_known_models() -> None:
    for depth, count in ((32, 21), (30, 20), (18, 12), (40, 26), (28, 18), (1, 1)):
        assert len(select_layers("last:21/32", depth)) == count
    assert select_layers("first:1/80", 4) == [0]
    assert select_layers("last:7/7", 5) == [0, 1, 2, 3, 4]


@properties
@given(depth=depths, data=st.data())
def test_indices(depth: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(-depth, depth - 1), min_size=1, max_size=6))
    expected = [layer for layer in range(depth) if layer in indices or layer - depth in indices]
    as_text = ",".join(map(str, indices))
    for layers in (indices, tuple(indices), as_text):
        assert select_layers(layers, depth) == expected
        assert select_layers(FitConfig(layers=layers).layers, depth) == expected


@properties
@given(
    signatures=st.lists(st.floats(0, 100), min_size=1, max_size=12, unique=True),
    data=st.data(),
)
def test_signature_takes_the_highest(signatures: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(signatures)))
    chosen = select_layers(f"signature:{count}", len(signatures), dict(enumerate(signatures)))
    assert chosen == sorted(chosen)
    assert sorted((signatures[layer] for layer in chosen), reverse=True) == sorted(signatures, reverse=True)[:count]


@pytest.mark.parametrize(
    "layers",
    [
        *("", "last", "last:", "last:0", "first:-1", "last:1.5", "last:0/4", "first:1/0", "last:1/2/3", "middle:3"),
        *("signature:0", "signature:x", "4,", ",4", "4 5", "1.0", "all:3", "ALL", "last: 3", "--1", "last:3\n"),
    ],
)
def test_forms_that_are_refused(layers: str) -> None:
    message = re.escape(
        f"layers is '{layers}', but it must be all, last:L, first:L, signature:L with L at least 1, a s"
    )
    for call in (lambda: select_layers(layers, 9), lambda: FitConfig(layers=layers)):
        with pytest.raises(SettingError, match=message + ".* indices such as 4,5,-1"):
            call()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("last:10", "layers 'last:10' asks for 10 layers, but the model has 9"),
        ("first:4/3", "layers 'first:4/3' asks for 12 layers, but the model has 9"),
        ("signature:10", "layers 'signature:10' asks for 10 layers, but the model has 9"),
        ("3,9", "layer 9 is outside the model, which has layers 0 to 8"),
        ([3, -10], "layer -10 is outside the model, which has layers 0 to 8"),
    ],
)
def test_layers_that_the_model_does_not_have(layers: str | Sequence[int], message: str) -> None:
    FitConfig(layers=layers)  # the depth is not known yet
    with pytest.raises(SiteError, match=re.escape(message)):
        select_layers(layers, 9, dict.fromkeys(range(9), 1.0))


def test_layers_are_kept_as_a_tuple() -> None:
    given_layers = [4, 1]
    config = FitConfig(layers=given_layers)
    given_layers.append(7)
    assert config.layers == (4, 1)
    assert hash(config) == hash(FitConfig(layers=(4, 1)))
