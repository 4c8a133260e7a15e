"""The administrator's routes, in an application of their own; those of vLLM are tested on a real server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from sealign.serving import ignored_edit
from sealign.serving.endpoint import ROUTE, EditEndpoint

TOKEN = {"Authorization": "Bearer right"}
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> TestClient:
    monkeypatch.setenv("SEALIGN_ADMIN_TOKEN", "right")
    monkeypatch.setattr(ignored_edit, "MAX_BODY", 4000)
    app = FastAPI()
    EditEndpoint().attach_router(app)

    @app.post("/v1/completions")
    def complete(body: dict[str, object]) -> dict[str, object]:
        return body

    @app.post("/v1/audio/transcriptions")
    @app.post("/upload")
    async def upload(request: Request) -> int:
        return len(await request.body())

    @app.post("/invocations")
    async def invoke(request: Request) -> object:
        return await request.json()

    return TestClient(app)


@pytest.mark.parametrize("token", [None, b"Bearer wrong"])
@pytest.mark.parametrize(("path", "status"), [(ROUTE, 401), ("/nothing", 404), (f"{ROUTE}/mild", 405)])
def test_no_body_is_read_before_the_route_and_the_token_are_known(
    client: TestClient, path: str, status: int, token: bytes | None
) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body is read")

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", b"100000000")]
    headers += [(b"authorization", token)] if token else []
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    asyncio.run(client.app(scope, receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == status


def test_a_body_is_read_up_to_its_largest_size(client: TestClient) -> None:
    assert client.post("/v1/completions", json={"prompt": "x" * 3900}).status_code == 200
    for path in ("/v1/completions", ROUTE):
        large = client.post(path, json={"name": "x" * 4000}, headers=TOKEN)
        assert (large.status_code, "larger than 4000 bytes" in large.text) == (413, True)
        pieces = client.post(path, content=iter([b" " * 3000] * 2), headers=TOKEN | JSON)
        assert pieces.status_code == 413
        said = client.post(path, content=b"{}", headers=TOKEN | JSON | {"Content-Length": str(10**8)})
        assert said.status_code == 413
    for kind in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "multipart/x"}):  # read as JSON by some routes
        assert client.post("/upload", content=b"x" * 5000, headers=kind).status_code == 413
    assert int(client.post("/v1/audio/transcriptions", files={"audio": b"x" * 5000}).text) > 5000


def test_json_that_is_nested_too_deeply_is_a_wrong_request(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ignored_edit, "MAX_BODY", 10**6)
    deep = "[" * 100_000 + "]" * 100_000
    for body in (deep, f'{{"sealign_edit": {deep}}}', f'{{"vllm_xargs": {{"sealign_edit": {deep}}}}}'):
        for path in ("/v1/completions", "/invocations", ROUTE):
            assert client.post(path, content=body, headers=TOKEN | JSON).status_code == 400
        assert client.post("/invocations", content=body, headers={"Content-Type": "multipart/x"}).status_code == 400


@pytest.mark.parametrize("name", ["sealign_edit", "Sealign-Edit", "X-Sealign-Edit", "sealign-edits"])
def test_an_edit_that_is_named_outside_the_body_is_refused(client: TestClient, name: str) -> None:
    header = client.post("/v1/completions", json={"prompt": "x"}, headers={name: "mild"})
    assert (header.status_code, "a header names an edit" in header.text) == (400, True)
    for query in ({name: "mild"}, {"vllm_xargs": f'{{"{name}": "mild"}}'}):
        answer = client.post("/v1/completions", params=query, json={"prompt": "x"})
        assert (answer.status_code, "the query string names an edit" in answer.text) == (400, True)
    assert client.post("/v1/completions", params={"priority": "1"}, json={"prompt": f"{name}?"}).status_code == 200


def test_the_administrator_alone_is_let_in(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.get(ROUTE, headers=TOKEN).json() == []
    for headers in ({}, {"Authorization": "right"}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}):
        assert client.get(ROUTE, headers=headers).status_code == 401
    assert client.post(ROUTE, json={"name": "mild", "folder": "/etc"}, headers=TOKEN).status_code == 422
    monkeypatch.delenv("SEALIGN_ADMIN_TOKEN")
    for headers in (TOKEN, {"Authorization": "Bearer "}):
        assert client.get(ROUTE, headers=headers).status_code == 403
