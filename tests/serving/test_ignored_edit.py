"""Requests whose edit vLLM would ignore are rejected, and all others reach it unchanged."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from fastapi import HTTPException
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
        body(**{"Sealign-Edit": "mild"}),
        b'{"prompt": "\\u00e9", "\\u0073ealign\\u005fedit": "mild"}',
        body(sealign_edit="mild").decode().encode("utf-16"),
    ):
        assert "outside vllm_xargs" in (why_ignored("/v1/completions", wrong) or "")
    for other in ({"sealign_edit": "strong"}, {"messages": [{"x_sealign_edits": "strong"}]}):
        assert "in vllm_xargs and outside it" in (why_ignored("/v1/completions", body(**NAMED, **other)) or "")
    assert why_ignored("/v1/completions", body(prompt="sealign_edit", **NAMED)) is None
    assert why_ignored("/v1/completions", body(vllm_xargs={"sealign-edit": "x"})) is None  # resolve says what is wrong
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


def pass_through(method: str, chunks: list[bytes], kind: bytes = b"application/json") -> list[Any]:
    """What the application behind the check receives."""
    received: list[Any] = []
    messages = [
        {"type": "http.request", "body": chunk, "more_body": number < len(chunks) - 1}
        for number, chunk in enumerate(chunks)
    ]

    async def application(_scope: Any, receive: Any, _send: Any) -> None:
        received.extend([await receive() for _ in range(len(chunks) + 1)])

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    headers = [(b"content-type", kind)]
    scope = {"type": "http", "method": method, "path": "/v1/completions", "headers": headers}
    asyncio.run(RejectIgnoredEdit(application)(scope, receive, None))
    return received


def test_a_body_arrives_in_the_pieces_in_which_it_was_sent() -> None:
    whole = body(model="m", **NAMED)
    pieces = [whole[:9], whole[9:20], whole[20:]]
    for method, kind in (("POST", b"application/json"), ("GET", b"application/json"), ("POST", b"multipart/form-data")):
        received = pass_through(method, pieces, kind)
        assert [message.get("body") for message in received] == [*pieces, None]
        assert received[-1] == {"type": "http.disconnect"}


def test_the_end_of_a_wrong_body_never_reaches_the_application() -> None:
    whole = body(sealign_edit="mild")
    for pieces in ([whole], [whole[:15], whole[15:]], [bytes([byte]) for byte in whole]):
        with pytest.raises(HTTPException, match="outside vllm_xargs") as raised:
            pass_through("POST", pieces)
        assert raised.value.status_code == 400


def test_a_large_body_takes_time_in_proportion() -> None:
    """2,000 pieces of 16 kB: a copy of all that came before at each of them would be 32 GB."""
    pieces = [b" " * 16_000] * 2_000
    start = time.process_time()
    assert len(pass_through("POST", pieces)) == 2_001
    assert time.process_time() - start < 2
