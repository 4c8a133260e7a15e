"""Patches of vLLM's methods: made once, and only of methods that are what the plug-in expects."""

from __future__ import annotations

from typing import Any

import pytest

from sealign.errors import ServingError
from sealign.serving.patching import after, before, wrap


def a_class() -> Any:
    class Runner:
        def run(self, first: int, second: int, *, third: int = 0) -> int:
            return first + second + third

    return Runner


def doubled(method: Any) -> Any:
    return lambda self, *args, **kwargs: 2 * method(self, *args, **kwargs)


def test_a_method_is_wrapped_once() -> None:
    runner = a_class()
    for _ in range(3):
        wrap(runner, "run", doubled, parameters=("first", "second"), keywords=("third",))
    assert runner().run(1, 2, third=3) == 12


def test_actions_before_and_after() -> None:
    runner, seen = a_class(), []
    before(runner, "run", lambda self, *args: seen.append(args))
    assert runner().run(1, 2) == 3
    other = a_class()
    after(other, "run", lambda self, result, *args: seen.append((result, *args)), parameters=("first",))
    assert other().run(4, 5) == 9
    assert seen == [(1, 2), (9, 4, 5)]


@pytest.mark.parametrize(
    ("parameters", "keywords"),
    [(("second",), ()), (("first", "third"), ()), (("first", "second", "more"), ()), ((), ("fourth",))],
)
def test_a_method_with_other_parameters_is_refused(parameters: Any, keywords: Any) -> None:
    runner = a_class()
    with pytest.raises(ServingError, match=r"Runner.run of vLLM .* has the parameters \(first, second, third\), but"):
        wrap(runner, "run", doubled, parameters=parameters, keywords=keywords)
    assert runner().run(1, 2) == 3  # it is as it was


def test_a_method_that_is_gone_is_refused() -> None:
    class Derived(a_class()):  # type: ignore[misc]
        pass

    with pytest.raises(ServingError, match=r"vLLM .* has no Derived.run, which the plug-in wraps; install vllm=="):
        wrap(Derived, "run", doubled)
