from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sealign.playground.alternating import alternate

CPU = torch.device("cpu")


def counting(name: str, count: int, seen: list[str]) -> Callable[[Callable[[], None]], None]:
    def run(pause: Callable[[], None]) -> None:
        for number in range(count):
            seen.append(f"{name}{number}")
            pause()

    return run


def test_functions_take_turns_until_each_has_ended() -> None:
    seen: list[str] = []
    begun: list[str] = []
    functions = {"a": counting("a", 2, seen), "b": counting("b", 4, seen), "c": counting("c", 1, seen)}
    alternate(functions, before_turn=begun.append, device=CPU)
    assert seen == ["a0", "b0", "c0", "a1", "b1", "b2", "b3"]
    assert begun == ["a", "b", "c", "a", "b", "c", "a", "b", "b", "b"]  # a last turn each, in which it ends


@pytest.mark.parametrize("failing", ["a", "b"])
def test_an_error_ends_all(failing: str) -> None:
    seen: list[str] = []
    before = threading.active_count()

    def fail(pause: Callable[[], None]) -> None:
        pause()
        raise KeyError(failing)

    functions = {name: counting(name, 9, seen) for name in "ab"} | {failing: fail}
    with pytest.raises(KeyError, match=failing):
        alternate(functions, before_turn=lambda _: None, device=CPU)
    assert len(seen) <= 2
    assert threading.active_count() == before


def test_an_error_before_a_turn_ends_all() -> None:
    def refuse(name: str) -> None:
        if name == "b":
            raise RuntimeError("no turn")

    with pytest.raises(RuntimeError, match="no turn"):
        alternate({name: counting(name, 3, []) for name in "ab"}, before_turn=refuse, device=CPU)


def test_each_has_random_numbers_of_its_own_and_leaves_those_of_others() -> None:
    drawn: dict[str, list[float]] = {"a": [], "b": []}

    def draw(name: str, seed: int, count: int) -> Callable[[Callable[[], None]], None]:
        def run(pause: Callable[[], None]) -> None:
            torch.manual_seed(seed)
            for _ in range(count):
                drawn[name].append(float(torch.rand(())))
                pause()

        return run

    torch.manual_seed(5)
    expected_after = torch.rand(3)
    torch.manual_seed(5)
    alternate({"a": draw("a", 1, 4), "b": draw("b", 2, 6)}, before_turn=lambda _: None, device=CPU)
    after: Any = torch.rand(3)
    assert torch.equal(after, expected_after)
    for name, seed, count in (("a", 1, 4), ("b", 2, 6)):
        torch.manual_seed(seed)
        assert drawn[name] == [float(torch.rand(())) for _ in range(count)]


@pytest.mark.parametrize(("device", "given"), [("cuda:1", ("cuda:1",)), ("mps", ())])
def test_the_generator_of_the_device_is_kept_too(
    monkeypatch: pytest.MonkeyPatch, device: str, given: tuple[str, ...]
) -> None:
    """With a stand-in for the module of the device, whose random numbers count up from the seed."""

    class Module:
        state = 100

        def get_rng_state(self, *of: torch.device) -> int:
            assert tuple(map(str, of)) == given
            return self.state

        def set_rng_state(self, state: int, *of: torch.device) -> None:
            assert tuple(map(str, of)) == given
            self.state = state

    module, drawn = Module(), {"a": [], "b": []}  # type: tuple[Module, dict[str, list[int]]]
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)

    def draw(name: str, seed: int) -> Callable[[Callable[[], None]], None]:
        def run(pause: Callable[[], None]) -> None:
            module.state = seed
            for _ in range(3):
                module.state += 1
                drawn[name].append(module.state)
                pause()

        return run

    alternate({"a": draw("a", 10), "b": draw("b", 20)}, before_turn=lambda _: None, device=torch.device(device))
    assert (drawn, module.state) == ({"a": [11, 12, 13], "b": [21, 22, 23]}, 100)
