"""Calls of modules with made-up arguments."""

from __future__ import annotations

import copy
from collections import UserDict
from typing import Any

import torch

from sealign.models.module_calls import made_up, made_up_calls
from tests.tiny_models import build_model


def test_every_tensor_gets_a_value_and_all_else_stays() -> None:
    meta = torch.device("meta")
    given: Any = {
        "states": UserDict(full=(torch.empty(2, 3, dtype=torch.bfloat16, device=meta), None)),
        "positions": [torch.empty(1, 2, dtype=torch.long, device=meta)],
        "mask": torch.empty(1, 1, 2, 2, dtype=torch.bool, device=meta),
        "name": "x",
    }
    found = made_up(given, torch.Generator().manual_seed(3))
    first = found["states"]["full"][0]
    assert (first.shape, first.dtype, first.device.type) == ((2, 3), torch.bfloat16, "cpu")
    assert first.unique().numel() > 3
    assert found["positions"][0].tolist() == [[0, 0]]
    assert found["mask"].tolist() == [[[[True, False], [False, True]]]]
    assert (found["name"], found["states"]["full"][1]) == ("x", None)


def test_calls_are_those_of_the_model_and_repeatable() -> None:
    model = build_model("llama", vocab_size=50)
    paths = ["model.layers.1.mlp", "model.layers.3.self_attn"]
    skeleton = copy.deepcopy(model).to("meta")
    calls, again = made_up_calls(skeleton, paths), made_up_calls(skeleton, paths)
    assert list(calls) == paths
    with torch.no_grad():
        for path in paths:
            output = calls[path].run(model.get_submodule(path))
            assert output.shape == (1, 2, 48)
            assert bool(output.isfinite().all())
            assert float(output.std()) > 0.1
            assert torch.equal(output, again[path].run(model.get_submodule(path)))
    assert not any(module._forward_pre_hooks for module in skeleton.modules())
