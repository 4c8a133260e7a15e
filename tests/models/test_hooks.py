from __future__ import annotations

import copy
import gc
import inspect
import weakref
from typing import Any

import torch
from torch import nn

from sealign.models.hooks import add_hook


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def add_one(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output + 1


def test_a_hook_acts_until_it_is_removed() -> None:
    module, x = Doubled(), torch.ones(3)
    before = dict(vars(module))
    remove = add_hook(module, add_one)
    assert torch.equal(module(x), 2 * x + 1)
    assert torch.equal(copy.deepcopy(module)(x), 2 * x + 1)
    remove()
    assert torch.equal(module(x), 2 * x)
    assert vars(module) == before


def test_hooks_before_a_module_and_with_keyword_arguments() -> None:
    module = Doubled()
    seen: list[Any] = []
    add_hook(module, lambda _module, inputs: (inputs[0] + 1,), before=True)
    add_hook(module, lambda _module, _args, kwargs: seen.append(kwargs), before=True, with_kwargs=True)
    add_hook(module, lambda _module, _args, kwargs, output: output + len(kwargs), with_kwargs=True)
    assert torch.equal(module(torch.ones(2)), torch.full((2,), 4.0))
    assert seen == [{}]


def test_a_module_has_a_forward_of_its_own_while_it_has_hooks() -> None:
    """Whichever of them goes first: a compiled graph is guarded on it."""
    for order in ((0, 1), (1, 0)):
        module = Doubled()
        removals = [add_hook(module, add_one), add_hook(module, add_one)]
        for number in order:
            assert vars(module)["forward"] == module.forward
            removals[number]()
        assert "forward" not in vars(module)


def test_a_forward_that_another_library_gave_is_replaced_and_restored() -> None:
    """As by accelerate, on devices of different kinds."""
    module: Any = Doubled()

    def tripled(x: torch.Tensor, factor: int = 3) -> torch.Tensor:
        return factor * x

    module.forward = tripled
    for _ in range(2):
        removals = [add_hook(module, add_one), add_hook(module, add_one)]
        assert module.forward is not tripled
        assert inspect.signature(module.forward) == inspect.signature(tripled)
        assert torch.equal(module(torch.ones(2)), torch.full((2,), 5.0))
        for remove in removals:
            remove()
        assert module.forward is tripled


def test_a_forward_that_is_given_meanwhile_stays() -> None:
    module: Any = Doubled()
    remove = add_hook(module, add_one)
    module.forward = lambda x: 5 * x
    remove()
    assert torch.equal(module(torch.ones(2)), torch.full((2,), 5.0))


def test_a_hooked_module_is_not_kept_alive() -> None:
    module = Doubled()
    add_hook(module, add_one)
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None
