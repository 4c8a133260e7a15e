"""Settings that the methods which edit activations share."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from sealign.errors import SettingError
from sealign.fitting.collect_config import CollectConfig
from sealign.fitting.edit_config import EditConfig
from sealign.models.prompt_format import PromptFormat
from sealign.models.sites import SITES


def test_defaults() -> None:
    assert EditConfig().dump() == CollectConfig().dump() | {
        "site": "mlp",
        "layers": "last:21/32",
        "module_pattern": None,
        "layer_weights": None,
        "gate": None,
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


def test_the_depth_of_the_model_is_not_known_yet() -> None:
    """Which forms a choice of layers may have is tested in ``tests/models/test_layer_choice.py``."""
    assert EditConfig(layers="last:999").layers == "last:999"
    assert EditConfig(layers=[-999, 999]).layers == (-999, 999)


def test_layers_are_kept_as_a_tuple() -> None:
    given_layers = [4, 1]
    config = EditConfig(layers=given_layers)
    given_layers.append(7)
    assert config.layers == (4, 1)
    assert EditConfig(layers=np.array([4, 1])).layers == (4, 1)  # type: ignore[arg-type]
    assert EditConfig(layers=range(2, 4)).layers == (2, 3)
    assert hash(config) == hash(EditConfig(layers=(4, 1)))
    assert EditConfig(**json.loads(json.dumps(config.dump()))) == config
