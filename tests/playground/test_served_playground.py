"""A playground whose model runs on a server: against the same tiny model here."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openai")

from starlette.testclient import TestClient

import sealign
from sealign.errors import ServingError
from sealign.evaluation.damage import measure_damage
from sealign.playground.application import playground_application
from sealign.playground.offered_edits import OfferedEdits
from sealign.playground.playground import Playground
from sealign.playground.served_playground import NOT_OFFERED, ServedPlayground
from tests.playground.stub_server import StubServer, running


@pytest.fixture(scope="module")
def edits(edits: dict[str, sealign.Edit]) -> dict[str, sealign.Edit]:
    """So strong that answers change, since a server has the strengths of its edits."""
    return {"mild": edits["mild"].with_strength(3.0), "shift": edits["shift"].with_strength(2.0)}


@pytest.fixture
def stub(model: Any, tokenizer: Any, edits: Any) -> StubServer:
    return StubServer(model, tokenizer, edits)


@pytest.fixture
def url(stub: StubServer) -> Iterator[str]:
    with running(stub.application) as address:
        yield address


@pytest.fixture
def client(url: str, stub: StubServer) -> Iterator[TestClient]:
    served = ServedPlayground(url, ["mild", "shift"])
    stub.requests.clear()
    with TestClient(playground_application(served), base_url="http://127.0.0.1:7860") as client:
        yield client


@pytest.fixture
def local(model: Any, tokenizer: Any, edits: Any) -> Iterator[TestClient]:
    playground = Playground(model, tokenizer, OfferedEdits(model, tokenizer, edits), name="tiny")
    with TestClient(playground_application(playground), base_url="http://127.0.0.1:7860") as client:
        yield client


def asked(client: TestClient, job: str, /, **body: Any) -> list[dict[str, Any]]:
    response = client.post(f"/api/{job}", json=body)
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


def tokens(events: list[dict[str, Any]], arm: str) -> list[Any]:
    return [(event["id"], event["end"]) for event in events if event.get("arm") == arm and event["event"] == "token"]


MESSAGE = {
    "message": "And ice?",
    "system": "Be brief.",
    "earlier": [{"user": "Hello.", "base": "Good day.", "edited": "Hi, hi."}],
}


@pytest.mark.parametrize("name", [None, "mild", "shift"])
def test_answers_are_those_of_the_model_here(
    client: TestClient, local: TestClient, edits: Any, stub: StubServer, name: str | None
) -> None:
    here = [] if name is None else [{"name": name, "strength": edits[name].strength}]
    there = [] if name is None else [{"name": name}]
    expected = asked(local, "answer", **MESSAGE, edits=here, max_new_tokens=8)
    found = asked(client, "answer", **MESSAGE, edits=there, max_new_tokens=8)
    for arm in ("base", "edited"):
        assert tokens(found, arm) == tokens(expected, arm)
        assert len(tokens(found, arm)) == 8
    assert (tokens(found, "base") != tokens(found, "edited")) or name is None
    assert found[-1] == {"event": "finished"}
    assert [event["complete"] for event in found if event["event"] == "end"] == [False, False]
    assert sum("vllm_xargs" in request for request in stub.requests) == len(there)


def test_an_answer_that_ends(client: TestClient, model: Any) -> None:
    third = tokens(asked(client, "answer", message="Ice?", max_new_tokens=3), "base")[2][0]
    model.generation_config.eos_token_id = third
    try:
        found = asked(client, "answer", message="Ice?", max_new_tokens=9)
    finally:
        model.generation_config.eos_token_id = None
    assert tokens(found, "base")[-1] == (third, True)
    assert all(event["complete"] for event in found if event["event"] == "end")


def test_settings_reach_the_server(client: TestClient, stub: StubServer) -> None:
    asked(client, "answer", message="Ice?", max_new_tokens=2, temperature=0.7, top_p=0.9, seed=5)
    asked(client, "answer", message="Ice?", max_new_tokens=2, template_arguments={"mood": "calm"})
    sampled, _, greedy, _ = stub.requests
    assert (sampled["temperature"], sampled["top_p"], sampled["seed"]) == (0.7, 0.9, 5)
    assert (greedy["temperature"], greedy["chat_template_kwargs"]) == (0, {"mood": "calm"})
    assert "seed" not in greedy


def test_effects_are_bounds(client: TestClient, local: TestClient, edits: Any) -> None:
    answer = [77, 12, 60, 3, 18]
    here = [{"name": "shift", "strength": edits["shift"].strength}]
    _, exact, _ = asked(local, "effects", **MESSAGE, edits=here, answer=answer)
    _, bound, _ = asked(client, "effects", **MESSAGE, edits=[{"name": "shift"}], answer=answer)
    assert (exact["at_least"], bound["at_least"]) == (False, True)
    for one, other in zip(exact["tokens"], bound["tokens"], strict=True):
        assert 0 < other["divergence"] <= one["divergence"]
        assert (other["base"], other["edited"]) == (pytest.approx(one["base"]), pytest.approx(one["edited"]))
        for name in ("base_alternatives", "edited_alternatives"):
            logs = [[item["log_probability"] for item in effect[name]] for effect in (one, other)]
            assert logs[0] == pytest.approx(logs[1])
    assert bound["mean_divergence"] == pytest.approx(np.mean([token["divergence"] for token in bound["tokens"]]))


def test_damage(client: TestClient, model: Any, tokenizer: Any, edits: Any) -> None:
    events = asked(client, "damage", edits=[{"name": "shift"}])
    found = next(event for event in events if event["event"] == "damage")
    expected = measure_damage(model, tokenizer, edits["shift"])
    assert found["loss_increase"] == pytest.approx(expected.loss_increase, abs=1e-5)
    assert found["loss_interval"] == pytest.approx(list(expected.loss_interval), abs=1e-5)
    assert 0 < found["divergence"] < expected.mean_divergence
    assert found["at_least"] is True


@pytest.mark.parametrize(
    ("job", "body", "words"),
    [
        ("answer", {"message": "x", "edits": [{"name": "mild"}, {"name": "shift"}]}, "2 edits are switched on"),
        (
            "answer",
            {"message": "x", "edits": [{"name": "mild", "strength": 2}]},
            "strength is 2, but the server sets it",
        ),
        ("answer", {"message": "x", "edits": [{"name": "other"}]}, "unknown edit 'other'; choose one of: mild, shift"),
        ("answer", {"message": " "}, "the message is empty"),
        ("effects", {"message": "x", "edits": [{"name": "other"}], "answer": [4]}, "unknown edit 'other'"),
        ("damage", {}, "no edit is switched on"),
        ("load", {"path": "late"}, NOT_OFFERED),
        ("fit", {"name": "x", "method": "sea", "behaviour": "fairness"}, NOT_OFFERED),
        ("search", {"name": "x", "methods": ["sea"], "max_minutes": 1.0, "behaviour": "fairness"}, NOT_OFFERED),
        ("save", {"name": "mild", "folder": "x"}, NOT_OFFERED),
        ("forms", {"name": "mild"}, NOT_OFFERED),
        ("push", {"name": "mild", "repository": "me/x", "private": True}, NOT_OFFERED),
    ],
)
def test_what_is_refused(client: TestClient, job: str, body: dict[str, Any], words: str) -> None:
    *_, last = asked(client, job, **body)
    assert last["event"] == "error"
    assert words in last["message"]


def test_what_is_not_offered_is_said(client: TestClient) -> None:
    assert client.get("/api/playground").json()["not_offered"] == NOT_OFFERED
    response = client.post("/api/download", json={"name": "mild", "form": "edit"})
    assert (response.status_code, response.json()["error"]) == (400, NOT_OFFERED)


def test_a_server_that_fails(client: TestClient, stub: StubServer) -> None:
    stub.fail = True
    for job, body in (("answer", {}), ("effects", {"answer": [5]}), ("damage", {"edits": [{"name": "mild"}]})):
        *_, last = asked(client, job, **(body if job == "damage" else {"message": "x"} | body))
        assert last["event"] == "error"
        assert "did not answer: " in last["message"]
        assert "the engine is dead" in last["message"]
    stub.fail = False
    assert asked(client, "answer", message="x", max_new_tokens=2)[-1] == {"event": "finished"}


def test_a_stop_reaches_an_answer_that_waits(url: str, stub: StubServer) -> None:
    """Closing the playground stops its jobs, also between two tokens."""
    served, found = ServedPlayground(url, []), []
    stub.pause = 1.0
    application = playground_application(served)
    with TestClient(application, base_url="http://127.0.0.1:7860") as client:
        thread = threading.Thread(target=lambda: found.extend(asked(client, "answer", message="x", max_new_tokens=30)))
        thread.start()
        while not stub.requests[1:]:
            time.sleep(0.01)
        begun = time.monotonic()
        application.state.queue.close()
        thread.join(30)
    assert time.monotonic() - begun < 15
    assert found[-1] == {"event": "stopped"}
    stub.pause = 0.0


def test_servers_that_are_refused(url: str, model: Any, tokenizer: Any, edits: Any) -> None:
    with pytest.raises(ServingError, match="did not answer: .*there is no edit 'other'"):
        ServedPlayground(url, ["mild", "other"])
    with pytest.raises(ServingError, match="the server at http://127.0.0.1:9 did not answer: Connection error"):
        ServedPlayground("http://127.0.0.1:9/v1", [])
    with (
        running(StubServer(model, tokenizer, edits, knows_edits=False).application) as other,
        pytest.raises(ServingError, match="ignores edits; start it with sealign serve"),
    ):
        ServedPlayground(other, ["mild"])
