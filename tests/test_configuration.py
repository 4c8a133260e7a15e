from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import pytest
import torch
from pydantic import Field, model_validator

from sealign.configuration import Config
from sealign.errors import SettingError, SiteError

Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class Style:
    name: str = "plain"


class CommonConfig(Config):
    batch_size: Annotated[int, Field(ge=1)] = 16


class NestedConfig(Config):
    seed: int = 0


class ExampleConfig(CommonConfig):
    explained_variance: Annotated[Share | tuple[Share, Share], Field(examples=[0.9, 0.998])] = 0.998
    development_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    rank: Annotated[int, Field(ge=1)] | None = None
    token: Annotated[Literal["first", "last"], Field(title="token choice")] = "last"
    centered: bool = False
    layers: str | Sequence[int] = "all"
    dtype: str = "auto"
    data_dir: Path | None = None
    style: Style = Style()
    nested: NestedConfig = NestedConfig()
    strength: float = 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.strength == 13:
            raise SiteError("no such site")
        if self.rank is not None and "explained_variance" in self.model_fields_set:
            raise SettingError("give rank or explained_variance, not both")
        return self


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({"rank": np.int64(3)}, 3),
        ({"strength": np.float32(0.5)}, 0.5),
        ({"strength": 2}, 2.0),
        ({"centered": np.bool_(True)}, True),
        ({"explained_variance": [0.5, 1]}, (0.5, 1.0)),
        ({"layers": range(3)}, (0, 1, 2)),
        ({"layers": [np.int32(1), 2]}, (1, 2)),
        ({"layers": np.arange(2)}, (0, 1)),
        ({"dtype": torch.bfloat16}, "bfloat16"),
        ({"dtype": torch.device("cuda", 1)}, "cuda:1"),
        ({"data_dir": "/data"}, Path("/data")),
        ({"style": {"name": "chat"}}, Style("chat")),
        ({"nested": {"seed": 4}}, NestedConfig(seed=4)),
    ],
)
def test_values_of_other_libraries_become_python_values(values: dict[str, Any], kept: Any) -> None:
    (name,) = values
    found = getattr(ExampleConfig(**values), name)
    assert repr(found) == repr(kept)  # equality takes 2 for 2.0, and True for 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"explained_varianse": 1},
            "unknown ExampleConfig setting 'explained_varianse' (did you mean 'explained_variance'?); choose one of: "
            "batch_size, explained_variance, development_share, rank, token, centered, layers, dtype, data_dir, style, "
            "nested, strength",
        ),
        ({"explained_variance": 2}, "explained_variance is 2, but it must be in (0, 1]; try 0.9 or 0.998"),
        ({"explained_variance": (0.5, 3)}, "explained_variance is 3, but it must be in (0, 1]; try 0.9 or 0.998"),
        (
            {"explained_variance": [0.5]},
            "explained_variance is (0.5,), but it must be a number or a sequence of 2 values; try 0.9 or 0.998",
        ),
        ({"development_share": 1}, "development_share is 1, but it must be in (0, 1)"),
        ({"rank": 0}, "rank is 0, but it must be at least 1"),
        ({"rank": 2.5}, "rank is 2.5, but it must be an integer"),
        ({"rank": 2.0}, "rank is 2.0, but it must be an integer"),
        ({"rank": True}, "rank is True, but it must be an integer"),
        ({"rank": "3"}, "rank is '3', but it must be an integer"),
        ({"strength": True}, "strength is True, but it must be a number"),
        ({"strength": float("nan")}, "strength is nan, but it must be finite"),
        ({"strength": None}, "strength is None, but it must be a number"),
        ({"centered": 1}, "centered is 1, but it must be True or False"),
        ({"token": "fist"}, "unknown token choice 'fist' (did you mean 'first'?); choose one of: first, last"),
        ({"token": 3}, "token is 3, but it must be one of 'first' or 'last'"),
        ({"layers": 3}, "layers is 3, but it must be a string or a sequence"),
        ({"style": 3}, "style is 3, but it must be a Style"),
        ({"nested": {"seed": 0.5}}, "seed is 0.5, but it must be an integer"),
        ({"rank": 3, "explained_variance": 0.9}, "give rank or explained_variance, not both"),
    ],
)
def test_one_sentence_names_setting_value_and_bound(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError) as error:
        ExampleConfig(**values)
    assert str(error.value) == message


def test_errors_of_validators_reach_the_caller_unchanged() -> None:
    with pytest.raises(SiteError, match="^no such site$"):
        ExampleConfig(strength=13)


def test_positional_arguments_are_refused_with_the_first_own_setting() -> None:
    message = r"^ExampleConfig takes keyword arguments only; write ExampleConfig\(explained_variance=0\.9\)$"
    with pytest.raises(SettingError, match=message):
        ExampleConfig(0.9)  # type: ignore[call-arg, arg-type]


def test_missing_settings_are_named() -> None:
    class TaskConfig(Config):
        tasks: tuple[str, ...]

    with pytest.raises(SettingError, match=r"^TaskConfig needs the setting 'tasks'; write TaskConfig\(tasks=\.\.\.\)$"):
        TaskConfig()  # type: ignore[call-arg]


def test_frozen() -> None:
    config = ExampleConfig()
    with pytest.raises(SettingError, match=r"ExampleConfig is frozen; .* replace\(rank=3\)"):
        config.rank = 3
    assert config.rank is None
    assert hash(config) == hash(ExampleConfig())


def test_replace_validates_and_keeps_what_was_given() -> None:
    config = ExampleConfig(explained_variance=0.9, layers=[1, 3])
    changed = config.replace(layers="all")
    assert (changed.explained_variance, changed.layers, config.layers) == (0.9, "all", (1, 3))
    with pytest.raises(SettingError, match="not both"):
        config.replace(rank=3)
    assert ExampleConfig(layers=[1]).replace(rank=3).rank == 3


def test_a_dump_is_json_and_builds_an_equal_configuration() -> None:
    config = ExampleConfig(
        explained_variance=(0.5, 0.75),
        layers=[1, -1],
        data_dir=Path("/data"),
        style=Style("x"),
        nested=NestedConfig(seed=2),
    )
    dumped = json.loads(json.dumps(config.dump(), allow_nan=False))
    assert dumped == config.dump()
    assert ExampleConfig(**dumped) == config


def test_copies_and_pickles_are_equal() -> None:
    config = ExampleConfig(strength=0.5)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
