"""How a request reaches the engine: with its edit, its salt and its counters; vLLM's own part is tested on a server."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sealign.serving import front_end, request_counters
from sealign.serving.served_edits import ServedEdit, ServedEdits

MILD = SimpleNamespace(lora_name="mild", lora_int_id=1, lora_path="sealign:1")
PLUGIN_EDIT = ServedEdit("mild", "1" * 64, "plugin", MILD)
LORA_EDIT = ServedEdit("adapted", "2" * 64, "lora", SimpleNamespace(lora_name="adapted", lora_int_id=2, lora_path="/x"))


class Counter:
    """A counter of Prometheus, as far as it is used."""

    found: dict[tuple[str, str], float]

    def __init__(self, name: str, text: str, labels: list[str]) -> None:
        self._name = name

    def labels(self, value: str) -> Any:
        def inc(amount: float = 1) -> None:
            key = (self._name, value)
            self.found[key] = self.found.get(key, 0) + amount

        return SimpleNamespace(inc=inc)


class InvalidRequestError(Exception):
    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> ServedEdits:
    """Edits of both routes, and stand-ins for the modules that the front end imports."""
    known = ServedEdits()
    for edit in (PLUGIN_EDIT, LORA_EDIT):
        known.add(edit)
    monkeypatch.setattr(front_end, "SERVED", known)
    monkeypatch.setattr(Counter, "found", {}, raising=False)
    request_counters.request_counters.cache_clear()
    stand_ins: dict[str, dict[str, Any]] = {
        "vllm.exceptions": {"VLLMNotFoundError": InvalidRequestError, "VLLMValidationError": InvalidRequestError},
        "prometheus_client": {"Counter": Counter},
    }
    for name, values in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return known


def parameters(kind: str = "DELTA", **extra: Any) -> Any:
    return SimpleNamespace(extra_args=extra or None, output_kind=SimpleNamespace(name=kind))


def ask(params: Any, adapter: Any = None, answers: tuple[tuple[int, bool], ...] = ((2, False), (1, True))) -> Any:
    """Send a request; return what reaches the engine."""
    reached: list[Any] = []

    async def generate(_self: Any, _prompt: Any, given: Any, lora_request: Any = None) -> AsyncGenerator[Any, None]:
        reached.append((given.extra_args, lora_request))
        for count, finished in answers:
            output = SimpleNamespace(token_ids=[0] * count)
            yield SimpleNamespace(prompt_token_ids=[1] * 5, outputs=[output], finished=finished)

    async def run() -> None:
        call = front_end._with_check(generate)
        async for _ in call(None, "prompt", params, lora_request=adapter):
            pass

    asyncio.run(run())
    return reached[0]


def test_a_name_selects_an_edit_of_either_route(served: ServedEdits) -> None:
    """In vllm_xargs or as the model; the engine gets the hash of the plug-in's edits, and the adapter of a LoRA."""
    mild = ({"sealign_edit": "1" * 64}, None)
    adapted = (None, LORA_EDIT.adapter)
    assert ask(parameters()) == (None, None)
    assert ask(parameters(sealign_edit="mild")) == mild
    assert ask(parameters(), PLUGIN_EDIT.adapter) == mild
    assert ask(parameters(sealign_edit="mild"), PLUGIN_EDIT.adapter) == mild
    assert ask(parameters(sealign_edit="adapted")) == adapted
    assert ask(parameters(), LORA_EDIT.adapter) == adapted
    assert ask(parameters(other=1), PLUGIN_EDIT.adapter) == ({"other": 1, "sealign_edit": "1" * 64}, None)
    with pytest.raises(InvalidRequestError, match="name one of them"):
        ask(parameters(sealign_edit="adapted"), PLUGIN_EDIT.adapter)
    served.remove(served.retire("mild"))
    with pytest.raises(InvalidRequestError, match="the edit 'mild' was unloaded"):
        ask(parameters(), PLUGIN_EDIT.adapter)


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(("kind", "generated"), [("DELTA", 3), ("FINAL_ONLY", 3), ("CUMULATIVE", 1)])
def test_edited_requests_are_counted(kind: str, generated: int) -> None:
    for _ in range(2):
        ask(parameters(kind, sealign_edit="mild"))
    ask(parameters(kind))
    assert Counter.found == {
        ("sealign_requests", "mild"): 2,
        ("sealign_prompt_tokens", "mild"): 10,
        ("sealign_generated_tokens", "mild"): 2 * generated,
    }


def test_a_trial_is_not_counted(served: ServedEdits) -> None:
    served.remove(served.retire("mild"))
    with served.on_trial(ServedEdit("mild", "3" * 64, "plugin")) as name:
        assert served.holds("3" * 64)
        assert ask(parameters(sealign_edit=name)) == ({"sealign_edit": "3" * 64}, None)
    assert not served.holds("3" * 64)
    assert Counter.found == {}


@pytest.mark.usefixtures("served")
def test_what_an_engine_never_gets() -> None:
    """A hash that no edit has, a salt of an edit, and an adapter without weights."""

    def process(_self: Any, _id: str, _prompt: Any, _params: Any, *_: Any, cache_salt: str = "", **__: Any) -> Any:
        return SimpleNamespace(cache_salt=cache_salt)

    call = front_end._with_salt(process)
    assert call(None, "1", "x", parameters()).cache_salt == ""
    salted = call(None, "1", "x", parameters(sealign_edit="1" * 64), cache_salt="own")
    assert salted.cache_salt == f"sealign {'1' * 64} own"
    for params, more, says in (
        (parameters(sealign_edit="3" * 64), {}, "no edit '333"),
        (parameters(), {"cache_salt": "sealign x"}, "must not begin with"),
        (parameters(), {"lora_request": PLUGIN_EDIT.adapter}, "this route takes no edits; 'mild' is one"),
    ):
        with pytest.raises(InvalidRequestError, match=says):
            call(None, "1", "x", params, **more)
    assert call(None, "1", "x", parameters(), lora_request=LORA_EDIT.adapter).cache_salt == ""
