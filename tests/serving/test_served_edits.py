"""Which edits requests may name, and how many requests use each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from sealign.errors import ServingError, UnknownEditError
from sealign.serving.served_edits import Registry, ServedEdit, held


@pytest.fixture
def registry() -> Registry:
    found = Registry()
    found.add(ServedEdit("mild", "1" * 64, "plugin"))
    found.add(ServedEdit("adapted", "2" * 64, "lora", adapter=object()))
    return found


def test_what_a_request_asks_for(registry: Registry) -> None:
    assert registry.resolve(None, None) is None
    assert registry.resolve({"other": 3}, None) is None
    assert registry.resolve(None, "adapter-of-the-operator") is None
    for extra, adapter, name in (
        ({"sealign_edit": "mild", "session_id": "x"}, None, "mild"),
        ({"sealign_edit": "adapted"}, None, "adapted"),
        ({"sealign_edit": "adapted"}, "adapted", "adapted"),
        (None, "adapted", "adapted"),
    ):
        found = registry.resolve(extra, adapter)
        assert found is not None
        assert found.name == name


@pytest.mark.parametrize("name", ["absent", "1" * 64, "", "Mild", 3, 1.5, ["mild"], None])
def test_an_edit_that_is_not_there(registry: Registry, name: Any) -> None:
    with pytest.raises(UnknownEditError, match="which has: adapted, mild"):
        registry.resolve({"sealign_edit": name}, None)


def test_requests_that_would_not_have_their_edit(registry: Registry) -> None:
    for key in ("sealign", "sealign_edits", "SEALIGN_EDIT", "sealign_strength"):
        with pytest.raises(ServingError, match="no key of ours"):
            registry.resolve({"sealign_edit": "mild", key: "mild"}, None)
    with pytest.raises(ServingError, match="name one of them"):
        registry.resolve({"sealign_edit": "mild"}, "adapted")


def test_names_and_edits_are_there_once(registry: Registry) -> None:
    registry.check_new("other", "3" * 64)
    with pytest.raises(ServingError, match="there is an edit 'mild' already"):
        registry.check_new("mild", "3" * 64)
    with pytest.raises(ServingError, match="this edit is loaded, as 'mild'"):
        registry.check_new("other", "1" * 64)
    edit = registry.retire("mild")
    with pytest.raises(UnknownEditError):
        registry.resolve({"sealign_edit": "mild"}, None)
    with pytest.raises(UnknownEditError):
        registry.retire("mild")
    assert registry.holds("1" * 64)
    for name, edit_hash in (("other", "1" * 64), ("mild", "3" * 64)):
        with pytest.raises(ServingError, match="still used by requests that run"):
            registry.check_new(name, edit_hash)
    registry.forget(edit)
    assert not registry.holds("1" * 64)
    registry.check_new("mild", "1" * 64)


def test_an_edit_is_held_for_as_long_as_its_requests_run(registry: Registry) -> None:
    edit = registry.edits[1]
    closed = []

    async def answers(count: int, fails: bool = False) -> AsyncGenerator[int, None]:
        try:
            for number in range(count):
                yield number
            if fails:
                raise ValueError("the engine failed")
        finally:
            closed.append(count)

    async def run() -> None:
        await asyncio.wait_for(edit.idle(), 1)
        first, second = held(edit, answers(3)), held(edit, answers(2, fails=True))
        assert await anext(first) == 0
        assert await anext(second) == 0
        assert edit.in_flight == 2
        waiting = asyncio.create_task(edit.idle())
        with pytest.raises(ValueError, match="the engine failed"):
            [number async for number in second]
        await asyncio.sleep(0)
        assert not waiting.done()
        await first.aclose()  # as when a client leaves
        await asyncio.wait_for(waiting, 1)
        assert [number async for number in held(edit, answers(4))] == [0, 1, 2, 3]

    asyncio.run(run())
    assert edit.in_flight == 0
    assert sorted(closed) == [2, 3, 4]
