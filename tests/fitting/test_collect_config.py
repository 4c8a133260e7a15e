from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from sealign.errors import SettingError
from sealign.fitting.collect_config import CollectConfig
from sealign.models.prompt_format import PromptFormat


def test_defaults() -> None:
    assert CollectConfig().dump() == {
        "token": "last",
        "neutral": "prompt",
        "max_new_tokens": 32,
        "prompt_format": {"style": "auto", "preamble": None, "chat_template_kwargs": {}, "date": "2024-07-26"},
        "batch_size": 16,
        "seed": 0,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"token": "lst"},
            "unknown token choice 'lst' (did you mean 'last'?); choose one of: last, mean, completion, random",
        ),
        ({"token": "first"}, "unknown token choice 'first'; choose one of: last, mean, completion, random"),
        ({"token": "men"}, "unknown token choice 'men' (did you mean 'mean'?)"),
        ({"neutral": "none"}, "unknown neutral choice 'none'"),
        ({"neutral": "promt"}, "unknown neutral choice 'promt' (did you mean 'prompt'?); choose one of"),
        ({"batch_size": 0}, "batch_size is 0, but it must be at least 1"),
        ({"batch_size": "auto"}, "batch_size is 'auto', but it must be an integer"),
        ({"batch_size": 2.5}, "batch_size is 2.5, but it must be an integer"),
        ({"batch_size": True}, "batch_size is True, but it must be an integer"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, but it must be at least 1"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1, but it must be at least 1"),
        ({"seed": 1.5}, "seed is 1.5, but it must be an integer"),
        ({"batchsize": 3}, "unknown CollectConfig setting 'batchsize' (did you mean 'batch_size'?)"),
    ],
)
def test_settings_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=re.escape(message)):
        CollectConfig(**change)
    with pytest.raises(SettingError, match=re.escape(message)):
        CollectConfig().replace(**change)


@pytest.mark.parametrize(
    "change",
    [
        *({"token": value} for value in ("last", "mean", "random")),
        *({"neutral": value} for value in ("prompt", "generated")),
        {"batch_size": 1, "max_new_tokens": 1},
    ],
    ids=str,
)
def test_settings_at_their_bounds(change: dict[str, Any]) -> None:
    config = CollectConfig(**change)
    assert {name: getattr(config, name) for name in change} == change


def test_numpy_integers_and_json() -> None:
    numbers: dict[str, Any] = {"batch_size": np.int64(3), "seed": np.int32(2)}
    config = CollectConfig(prompt_format=PromptFormat("few_shot", "Be brief."), **numbers)
    assert type(config.batch_size) is int
    assert config == CollectConfig(batch_size=3, seed=2, prompt_format=PromptFormat("few_shot", "Be brief."))
    assert CollectConfig(**json.loads(json.dumps(config.dump()))) == config
