"""Loading edits into an engine that fails, and names for adapters; the rest is tested on a real server."""

from __future__ import annotations

import asyncio
import copy
import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sealign
from sealign.errors import FingerprintError, SealignWarning, ServingError, UnknownEditError
from sealign.serving.canary import hooks_canary
from sealign.serving.edit_loader import EditLoader, adapter_key
from sealign.serving.settings import ServerSettings
from tests.serving.stand_in_vllm import Engine, install_stand_ins


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    install_stand_ins(monkeypatch)


def loader(engine: Engine) -> EditLoader:
    numbers = itertools.count(1)
    models = SimpleNamespace(
        is_base_model=lambda name: name == "base",
        lora_requests={},
        lora_id_counter=SimpleNamespace(inc=lambda step: next(numbers)),
    )
    return EditLoader(engine, models, ServerSettings("base", {}, None, "/nowhere"), engine.edits)


@pytest.fixture
def saved(small_edit: sealign.Edit, tmp_path: Path) -> Path:
    small_edit.save_pretrained(tmp_path / "edit")
    return tmp_path / "edit"


def test_loaded_and_unloaded(llama: Any, small_edit: sealign.Edit, saved: Path) -> None:
    engine = Engine(llama, [small_edit.hash] * 2)
    edits = loader(engine)

    async def run() -> None:
        assert (await edits.load("mild", saved)).route == "plugin"
        assert edits._models.lora_requests["mild"].lora_path == f"sealign:{small_edit.hash}"  # so vLLM lists its name
        with pytest.raises(ServingError, match="there is an edit 'mild' already"):
            await edits.load("mild", saved)
        await edits.unload("mild")

    asyncio.run(run())
    assert engine.calls == ["sealign_load_edit", "sealign_unload_edit"]
    assert edits.edits.edits == []
    assert edits._models.lora_requests == {}


def test_a_load_that_fails_leaves_nothing(llama: Any, small_edit: sealign.Edit, saved: Path) -> None:
    for answer, says in (
        (RuntimeError("no place"), "a worker cannot load the edit 'mild': no place"),
        (["x"], "changed"),
    ):
        engine = Engine(llama, answer)
        edits = loader(engine)
        with pytest.raises(ServingError, match=says):
            asyncio.run(edits.load("mild", saved))
        assert edits.edits.edits == []
        assert engine.calls[-1] == "sealign_unload_edit"
        assert not edits.edits.holds(small_edit.hash)


def test_an_unload_that_fails_can_be_tried_again(llama: Any, small_edit: sealign.Edit, saved: Path) -> None:
    engine = Engine(llama, [small_edit.hash] * 2, RuntimeError("no answer"))
    edits = loader(engine)

    async def run() -> None:
        await edits.load("mild", saved)
        with pytest.raises(ServingError, match="the engine cannot unload the edit 'mild': no answer; try again"):
            await edits.unload("mild")
        assert edits.edits.edits == []
        with pytest.raises(ServingError, match="is being unloaded"):
            await edits.load("mild", saved)
        await edits.unload("mild")
        with pytest.raises(UnknownEditError):
            await edits.unload("mild")
        engine.answers = [[small_edit.hash] * 2]
        await edits.load("mild", saved)

    asyncio.run(run())
    assert [edit.name for edit in edits.edits.edits] == ["mild"]


def test_what_is_cancelled_goes_on_to_its_end(llama: Any, small_edit: sealign.Edit, saved: Path) -> None:
    engine = Engine(llama, [small_edit.hash] * 2)
    edits = loader(engine)

    async def cancelled(work: Any) -> None:
        task = asyncio.ensure_future(work)
        await asyncio.sleep(0)  # it begins, and waits for a thread or a request
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def until(condition: Any) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.01)

    async def run() -> None:
        await cancelled(edits.load("mild", saved))
        await until(lambda: edits.edits.edits)
        (served,) = edits.edits.edits
        served.begin_request()
        await cancelled(edits.unload("mild"))
        again = asyncio.ensure_future(edits.unload("mild"))
        await asyncio.sleep(0.01)
        assert edits.edits.holds(small_edit.hash)
        assert engine.calls == ["sealign_load_edit"]
        served.end_request()
        await again
        await until(lambda: not edits.edits.holds(small_edit.hash))

    asyncio.run(run())
    assert engine.calls == ["sealign_load_edit", "sealign_unload_edit"]


def test_an_edit_is_compared_with_the_hooks_where_their_answer_is_known(
    llama: Any, small_edit: sealign.Edit, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = list(range(3, 12))
    for name, value in hooks_canary(llama, ids, [small_edit]).to_environment().items():
        monkeypatch.setenv(name, value)
    served = asyncio.run(loader(Engine(llama)).load("mild", saved))
    assert served.compared_with == "hooks"
    assert served.difference is not None
    assert served.difference < 1e-4
    small_edit.reversed().save_pretrained(saved.parent / "other")  # whose answer is not known
    other = asyncio.run(loader(Engine(llama)).load("other", saved.parent / "other"))
    assert (other.compared_with, other.difference) == ("base model", None)
    processed = Engine(llama)
    processed.vllm_config.model_config.logprobs_mode = "processed_logits"  # other numbers than log-probabilities
    assert asyncio.run(loader(processed).load("mild", saved)).compared_with == "base model"


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("fault", ["none", "every request", "half", "reversed", "NaN", "fails"])
def test_a_server_that_edits_wrongly_is_refused(
    llama: Any, small_edit: sealign.Edit, saved: Path, monkeypatch: pytest.MonkeyPatch, fault: str, known: bool
) -> None:
    """Without the hooks' answer, only an edit that does nothing, or something to every request, can be seen."""
    if known:
        for name, value in hooks_canary(llama, list(range(3, 12)), [small_edit]).to_environment().items():
            monkeypatch.setenv(name, value)
    engine = Engine(llama, fault=fault)
    edits = loader(engine)
    if not known and fault in ("half", "reversed", "NaN"):
        assert asyncio.run(edits.load("mild", saved)).compared_with == "base model"
        return
    says = {"fails": "the engine cannot try the edit 'mild': out of memory"}.get(fault)
    says = says or ("does not apply the edit 'mild' as the hooks do" if known else "changes no output")
    if known and fault == "every request":
        says = "does not apply|changes no output"
    with pytest.raises(ServingError, match=says):
        asyncio.run(edits.load("mild", saved))
    assert engine.calls == ["sealign_load_edit", "sealign_unload_edit"]
    assert not edits.edits.holds(small_edit.hash)
    assert edits.edits.edits == []
    assert edits._models.lora_requests == {}


def test_an_edit_of_strength_zero_has_nothing_to_compare(llama: Any, small_edit: sealign.Edit, tmp_path: Path) -> None:
    small_edit.with_strength(0).save_pretrained(tmp_path / "none")
    served = asyncio.run(loader(Engine(llama, fault="fails")).load("none", tmp_path / "none"))
    assert served.compared_with is None


def test_another_model_and_the_name_of_the_base_are_refused(tiny_model: Any, llama: Any, saved: Path) -> None:
    with pytest.raises(FingerprintError, match="this model differs"):
        asyncio.run(loader(Engine(tiny_model("qwen2"))).load("mild", saved))
    with pytest.raises(ServingError, match="is the name of the base model"):
        asyncio.run(loader(Engine(llama)).load("base", saved))


def test_other_weights_of_the_served_model_are_said(llama: Any, saved: Path, tmp_path: Path) -> None:
    tuned = copy.deepcopy(llama)
    with torch.no_grad():
        tuned.model.norm.weight *= 1.5
    for name, model in {"base": llama, "tuned": tuned}.items():
        model.save_pretrained(tmp_path / name)
        known = loader(Engine(llama, folder=tmp_path / name))
        if name == "base":
            asyncio.run(known.load("mild", saved))
            continue
        with pytest.warns(SealignWarning, match="and this checkpoint has other weights, so that the edit may not do"):
            asyncio.run(known.load("mild", saved))


def test_adapters_have_keys_by_edit_and_weights(small_edit: sealign.Edit, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1234")
    first = adapter_key(small_edit, tmp_path)
    assert adapter_key(small_edit, tmp_path) == first
    assert adapter_key(small_edit.reversed(), tmp_path) != first
    os.utime(weights, ns=(1, 1))
    assert adapter_key(small_edit, tmp_path) != first
