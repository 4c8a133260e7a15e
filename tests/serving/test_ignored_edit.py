"""Requests whose edit vLLM would ignore are rejected, and all others reach it unchanged."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealign.serving.ignored_edit import RejectIgnoredEdit, why_ignored


def body(**values: Any) -> bytes:
    return json.dumps(values).encode()


NAMED = {"vllm_xargs": {"sealign_edit": "mild"}}


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/x/v1/completions"]
)
def test_where_the_engine_looks(path: str) -> None:
    assert why_ignored(path, body(model="m", **NAMED)) is None


def test_where_it_does_not() -> None:
    for wrong in (
        body(sealign_edit="mild"),
        body(extra_body=NAMED),
        body(vllm_xargs={"nested": {"sealign_edit": "mild"}}),
        body(vllm_xargs=["sealign_edit", "mild"]),
        body(messages=[{"role": "user", "content": "x", "sealign_edit": "mild"}]),
    ):
        assert "outside vllm_xargs" in (why_ignored("/v1/completions", wrong) or "")
    assert "/v1/embeddings takes no edits" in (why_ignored("/v1/embeddings", body(**NAMED)) or "")
    assert "beam search" in (why_ignored("/v1/completions", body(use_beam_search=True, **NAMED)) or "")
    assert why_ignored("/v1/completions", body(use_beam_search=False, **NAMED)) is None


@given(st.text(), st.text())
def test_text_that_speaks_of_edits_is_text(before: str, after: str) -> None:
    text = f'{before}{{"sealign_edit": "mild"}}{after}'
    assert why_ignored("/v1/embeddings", body(prompt=text)) is None


@given(st.binary())
def test_what_is_no_json_is_left_to_the_engine(data: bytes) -> None:
    assert why_ignored("/v1/completions", data) is None
    assert why_ignored("/v1/completions", b'{"sealign_edit"' + data + b"\x00") is None
    assert why_ignored("/v1/completions", b'["sealign_edit"]') is None


def pass_through(method: str, chunks: list[bytes], kind: bytes = b"application/json") -> tuple[list[Any], list[Any]]:
    """What the application behind the check received, and what the client did."""
    received: list[Any] = []
    sent: list[Any] = []
    messages = [
        {"type": "http.request", "body": chunk, "more_body": number < len(chunks) - 1}
        for number, chunk in enumerate(chunks)
    ]

    async def application(_scope: Any, receive: Any, _send: Any) -> None:
        received.append(await receive())
        received.append(await receive())

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", kind)]
    scope = {"type": "http", "method": method, "path": "/v1/completions", "headers": headers}
    asyncio.run(RejectIgnoredEdit(application)(scope, receive, send))
    return received, sent


def test_a_body_in_pieces_arrives_whole() -> None:
    whole = body(model="m", **NAMED)
    received, sent = pass_through("POST", [whole[:9], whole[9:20], whole[20:]])
    assert received == [{"type": "http.request", "body": whole, "more_body": False}, {"type": "http.disconnect"}]
    assert sent == []
    for method, kind in (("GET", b"application/json"), ("POST", b"multipart/form-data; boundary=x")):
        received, _ = pass_through(method, [b"as", b"sent"], kind)
        assert [message["body"] for message in received] == [b"as", b"sent"]


def test_a_refusal_never_reaches_the_application() -> None:
    whole = body(sealign_edit="mild")
    received, sent = pass_through("POST", [whole[:15], whole[15:]])
    assert received == []
    assert sent[0]["status"] == 400
    assert json.loads(sent[1]["body"])["error"]["code"] == 400
