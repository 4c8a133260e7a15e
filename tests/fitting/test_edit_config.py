"""Settings that the methods which edit activations share, and the layers that they choose."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealign.errors import SettingError, SiteError
from sealign.fitting.collect_config import CollectConfig
from sealign.fitting.edit_config import EditConfig
from sealign.models.prompt_format import PromptFormat
from sealign.models.sites import SITES, select_layers

depths = st.integers(1, 80)
properties = settings(max_examples=80, deadline=None, derandomize=True)


def test_defaults() -> None:
    assert EditConfig().dump() == CollectConfig().dump() | {
        "site": "mlp",
        "layers": "last:21/32",
        "module_pattern": None,
        "strength": 1.0,
    }
    assert EditConfig() == EditConfig()


def test_config_is_frozen() -> None:
    with pytest.raises(SettingError, match=r"EditConfig is frozen; make a changed copy with replace\(strength=0.5\)"):
        EditConfig().strength = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": float("inf")}, "strength is inf, but it must be finite"),
        ({"strength": float("nan")}, "strength is nan, but it must be finite"),
        ({"strength": "strong"}, "strength is 'strong', but it must be a number"),
        ({"site": "mpl"}, "unknown site 'mpl' (did you mean 'mlp'?); choose one of: mlp, attention, residual"),
        ({"layers": ()}, "layers is empty; name at least one layer, or 'all'"),
        ({"layers": []}, "layers is empty; name at least one layer, or 'all'"),
        ({"layers": "most"}, "layers is 'most', but it must be one of: all; last:L, first:L or signature:L"),
        ({"layers": [1.5]}, "layers is (1.5,), but it must be"),
        ({"layers": [True]}, "layers is (True,), but it must be"),
        ({"layer": 3}, "unknown EditConfig setting 'layer' (did you mean 'layers'?)"),
        ({"batch_size": 0}, "batch_size is 0, but it must be at least 1"),
    ],
)
def test_settings_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=re.escape(message)):
        EditConfig(**change)


@pytest.mark.parametrize(
    "change", [*({"strength": value} for value in (0, -1.5, 3)), *({"site": value} for value in SITES)], ids=str
)
def test_settings_at_their_bounds(change: dict[str, Any]) -> None:
    config = EditConfig(**change)
    assert {name: getattr(config, name) for name in change} == change


def test_the_collection_has_its_own_settings() -> None:
    written = PromptFormat("few_shot", "Be brief.")
    own: dict[str, Any] = {
        "token": "random",
        "neutral": "generated",
        "max_new_tokens": 5,
        "prompt_format": written,
        "batch_size": 3,
        "seed": 11,
    }
    config = EditConfig(site="attention", strength=2, **own)
    assert config.collect_config() == CollectConfig(**own)
    assert (config.read_site, config.read_pattern, config.chooses_by_signature) == ("attention", None, False)
    assert EditConfig(layers="signature:2").chooses_by_signature
    assert EditConfig(module_pattern="model.layers.{layer}.mlp").read_pattern == "model.layers.{layer}.mlp"


@properties
@given(depth=depths, below=st.integers(1, 40), data=st.data())
def test_the_layer_at_a_share_of_the_depth_is_the_nearest(depth: int, below: int, data: st.DataObject) -> None:
    share = Fraction(data.draw(st.integers(0, below)), below)
    (layer,) = select_layers(f"at:{share.numerator}/{share.denominator}", depth)
    assert layer == depth - 1 or abs(layer - share * depth) <= Fraction(1, 2)
    assert layer < depth - 1 or share * depth >= depth - Fraction(3, 2)


@properties
@given(depth=depths, data=st.data())
def test_indices(depth: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(-depth, depth - 1), min_size=1, max_size=6))
    expected = [layer for layer in range(depth) if layer in indices or layer - depth in indices]
    as_text = ",".join(map(str, indices))
    for layers in (indices, tuple(indices), as_text, np.array(indices), [np.int64(layer) for layer in indices]):
        assert select_layers(layers, depth) == expected  # type: ignore[arg-type]
        assert select_layers(EditConfig(layers=layers).layers, depth) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "layers",
    [
        *("", "last", "last:", "last:0", "first:-1", "last:1.5", "last:0/4", "first:1/0", "last:1/2/3", "middle:3"),
        *("at:3", "at:4/3", "at:1/0", "at:", "at:-1/2"),
        *("signature:0", "signature:x", "4,", ",4", "4 5", "1.0", "all:3", "ALL", "last: 3", "--1", "last:3\n"),
    ],
)
def test_forms_that_are_refused(layers: str) -> None:
    message = re.escape(
        f"layers is '{layers}', but it must be one of: all; last:L, first:L or signature:L, with L at least 1 or a p"
    )
    for call in (lambda: select_layers(layers, 9), lambda: EditConfig(layers=layers)):
        with pytest.raises(SettingError, match=message + ".* indices such as 4,5,-1"):
            call()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("last:10", "layers 'last:10' selects 10 layers, but the model has 9"),
        ("first:4/3", "layers 'first:4/3' selects 12 layers, but the model has 9"),
        ("signature:10", "layers 'signature:10' selects 10 layers, but the model has 9"),
        ("3,9", "layer 9 is outside the model, which has layers 0 to 8"),
        ([3, -10], "layer -10 is outside the model, which has layers 0 to 8"),
    ],
)
def test_layers_that_the_model_does_not_have(layers: str | Sequence[int], message: str) -> None:
    EditConfig(layers=layers)  # the depth is not known yet
    with pytest.raises(SiteError, match=re.escape(message)):
        select_layers(layers, 9, dict.fromkeys(range(9), 1.0))


def test_layers_are_kept_as_a_tuple() -> None:
    given_layers = [4, 1]
    config = EditConfig(layers=given_layers)
    given_layers.append(7)
    assert config.layers == (4, 1)
    assert EditConfig(layers=np.array([4, 1])).layers == (4, 1)  # type: ignore[arg-type]
    assert EditConfig(layers=range(2, 4)).layers == (2, 3)
    assert hash(config) == hash(EditConfig(layers=(4, 1)))
    assert EditConfig(**json.loads(json.dumps(config.dump()))) == config
