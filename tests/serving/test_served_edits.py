"""Which edits requests may name, and how many requests use each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from sealign.errors import ServingError, UnknownEditError
from sealign.serving.served_edits import ServedEdit, ServedEdits, count_request

ADAPTER = SimpleNamespace(lora_name="adapted", lora_int_id=3)


@pytest.fixture
def served() -> ServedEdits:
    found = ServedEdits()
    found.add(ServedEdit("mild", "1" * 64, "plugin"))
    found.add(ServedEdit("adapted", "2" * 64, "lora", adapter=ADAPTER))
    return found


def test_what_a_request_asks_for(served: ServedEdits) -> None:
    assert served.resolve(None, None) is None
    assert served.resolve({"other": 3}, None) is None
    assert served.resolve(None, SimpleNamespace(lora_name="of-the-operator", lora_int_id=1)) is None
    for extra, adapter, name in (
        ({"sealign_edit": "mild", "session_id": "x"}, None, "mild"),
        ({"sealign_edit": "adapted"}, None, "adapted"),
        ({"sealign_edit": "adapted"}, ADAPTER, "adapted"),
        (None, ADAPTER, "adapted"),
    ):
        found = served.resolve(extra, adapter)
        assert found is not None
        assert found.name == name


@pytest.mark.parametrize("name", ["absent", "1" * 64, "", "Mild", 3, 1.5, ["mild"], None])
def test_an_edit_that_is_not_there(served: ServedEdits, name: Any) -> None:
    with pytest.raises(UnknownEditError, match="which has: adapted, mild"):
        served.resolve({"sealign_edit": name}, None)


def test_requests_that_would_not_have_their_edit(served: ServedEdits) -> None:
    for key in ("sealign", "sealign_edits", "SEALIGN_EDIT", "sealign_strength"):
        with pytest.raises(ServingError, match="unknown key"):
            served.resolve({"sealign_edit": "mild", key: "mild"}, None)
    with pytest.raises(ServingError, match="name one of them"):
        served.resolve({"sealign_edit": "mild"}, ADAPTER)


def test_a_request_that_began_before_its_adapter_was_unloaded_is_refused(served: ServedEdits) -> None:
    """As one of beam search, whose steps are requests of their own."""
    served.remove(served.retire("adapted"))
    with pytest.raises(UnknownEditError, match="the edit 'adapted' was unloaded"):
        served.resolve(None, ADAPTER)
    again = ServedEdit("adapted", "2" * 64, "lora", adapter=SimpleNamespace(lora_name="adapted", lora_int_id=4))
    served.add(again)
    assert served.resolve(None, again.adapter) is again
    with pytest.raises(UnknownEditError, match="the edit 'adapted' was unloaded"):
        served.resolve(None, ADAPTER)


def test_names_and_edits_are_there_once(served: ServedEdits) -> None:
    served.check_new("other", "3" * 64)
    with pytest.raises(ServingError, match="there is an edit 'mild' already"):
        served.check_new("mild", "3" * 64)
    with pytest.raises(ServingError, match="this edit is loaded, as 'mild'"):
        served.check_new("other", "1" * 64)
    edit = served.retire("mild")
    with pytest.raises(UnknownEditError):
        served.resolve({"sealign_edit": "mild"}, None)
    assert served.retire("mild") is edit
    assert served.is_retired(edit)
    assert served.holds("1" * 64)
    for name, edit_hash in (("other", "1" * 64), ("mild", "3" * 64)):
        with pytest.raises(ServingError, match="the edit 'mild' is being unloaded"):
            served.check_new(name, edit_hash)
    served.remove(edit)
    assert not served.is_retired(edit)
    with pytest.raises(UnknownEditError):
        served.retire("mild")
    assert not served.holds("1" * 64)
    served.check_new("mild", "1" * 64)


def test_an_edit_is_in_use_while_its_requests_run(served: ServedEdits) -> None:
    edit = served.edits[1]
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
        await asyncio.wait_for(edit.wait_until_idle(), 1)
        first, second = count_request(edit, answers(3)), count_request(edit, answers(2, fails=True))
        assert await anext(first) == 0
        assert await anext(second) == 0
        assert edit.in_flight == 2
        waiting = asyncio.create_task(edit.wait_until_idle())
        with pytest.raises(ValueError, match="the engine failed"):
            [number async for number in second]
        await asyncio.sleep(0)
        assert not waiting.done()
        await first.aclose()  # as when a client leaves
        await asyncio.wait_for(waiting, 1)
        assert [number async for number in count_request(edit, answers(4))] == [0, 1, 2, 3]

    asyncio.run(run())
    assert edit.in_flight == 0
    assert sorted(closed) == [2, 3, 4]
