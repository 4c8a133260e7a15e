from __future__ import annotations

import pytest

from sealign.edits.handle import EditHandle
from sealign.errors import SettingError
from tests.edits.edit_data import make_edit
from tests.edits.test_intervention import Note, make_note


def test_a_new_handle() -> None:
    edit = make_edit()
    handle = EditHandle(edit)
    assert (handle.edit, handle.strength, handle.enabled, handle.active) == (edit, 0.7, True, True)
    assert handle.modules == ["model.layers.1.mlp", "model.layers.3.mlp"]


def test_strength() -> None:
    handle = EditHandle(make_edit())
    handle.set_strength("-1.5")
    assert handle.strength == -1.5
    for bad, message in (("high", "must be a number"), (float("nan"), "must be finite")):
        with pytest.raises(SettingError, match=message):
            handle.set_strength(bad)
    assert handle.strength == -1.5
    assert handle.active
    handle.set_strength(0)
    assert (handle.enabled, handle.active) == (True, False)
    assert handle.edit.strength == 0.7  # which is what it is saved with


def test_an_intervention_without_strength() -> None:
    handle = EditHandle(make_note(strength=None))
    assert handle.strength is None
    assert handle.active
    with pytest.raises(SettingError, match=r"strength is 0.5, but note has no strength; leave it out"):
        handle.set_strength(0.5)


def test_switching() -> None:
    handle, calls = EditHandle(make_edit()), list[bool]()
    handle.on_switch = calls.append
    handle.switch(False)
    assert (handle.enabled, handle.active) == (False, False)
    handle.switch(True)
    with handle.switched(False):
        assert not handle.active
        with handle.switched(True):
            assert handle.active
        assert not handle.active
    assert handle.active
    with pytest.raises(RuntimeError), handle.switched(False):
        raise RuntimeError
    assert handle.active
    assert calls == [False, True, False, True, False, True, False, True]


def test_detaching_is_final() -> None:
    handle, calls = EditHandle(make_edit()), list[str]()
    handle.stack.callback(calls.append, "first")
    handle.stack.callback(calls.append, "last")
    handle.on_switch = lambda enabled: calls.append(f"switched {enabled}")
    with handle.switched(False):
        handle.detach()
        assert calls == ["switched False", "last", "first"]
    handle.switch(True)
    handle.detach()
    assert (handle.enabled, handle.active) == (False, False)
    assert calls == ["switched False", "last", "first"]


def test_an_error_while_detaching_does_not_keep_the_rest() -> None:
    handle, calls = EditHandle(Note(make_note().record)), list[str]()

    def fail() -> None:
        raise RuntimeError("cannot be undone")

    handle.stack.callback(calls.append, "first")
    handle.stack.callback(fail)
    with pytest.raises(RuntimeError, match="cannot be undone"):
        handle.detach()
    assert calls == ["first"]
    assert not handle.active
