"""RejectIgnoredEdit: a check of requests whose edit vLLM would ignore."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import unquote_plus

from fastapi import HTTPException

from sealign.serving.settings import REQUEST_KEY

MAX_BODY = 32 * 2**20
"""Largest body of a request, in bytes; forms with files are not limited."""

_GENERATING = ("/chat/completions", "/completions", "/responses", "/messages")
"""Ends of the paths whose requests can name an edit."""

_REMEDY = f'send it as "vllm_xargs": {{"{REQUEST_KEY}": NAME}}'


class RejectIgnoredEdit:
    """ASGI middleware that rejects a request that names an edit where vLLM ignores it.

    The body is checked when the application reads it, and never before: the application has found the route then, and
    has checked the token, so that other requests are answered without their body being read.

    Args:
        app: The application that answers the requests.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on; reading its body raises an HTTP error if its edit would be ignored."""
        if scope["type"] == "http" and scope["method"] == "POST":
            receive = _CheckedBody(scope, receive)
        await self._app(scope, receive, send)


class _CheckedBody:
    """The ``receive`` of a request, which raises an HTTP error in place of the end of a body that must be rejected."""

    def __init__(self, scope: Any, receive: Any) -> None:
        self._scope = scope
        self._receive = receive
        # In forms, such as those with audio, vLLM finds ``vllm_xargs`` itself. Some routes read JSON of any type.
        self._checked = not dict(scope["headers"]).get(b"content-type", b"").lower().startswith(b"multipart/")
        self._pieces: list[bytes] = []
        self._size = 0

    async def __call__(self) -> Any:
        reason = named_outside_body(self._scope["headers"], self._scope.get("query_string", b""))
        if reason is not None:
            raise HTTPException(400, reason)
        if self._checked:
            self._check_size(int(dict(self._scope["headers"]).get(b"content-length", b"0")))
        message = await self._receive()
        if self._checked and message["type"] == "http.request":
            self._check_piece(message)
        return message

    def _check_piece(self, message: Any) -> None:
        piece = message.get("body", b"")
        self._size += len(piece)
        self._check_size(self._size)
        self._pieces.append(piece)
        if not message.get("more_body", False):
            body, self._pieces = b"".join(self._pieces), []
            reason = why_ignored(self._scope["path"], body)
            if reason is not None:
                raise HTTPException(400, reason)

    @staticmethod
    def _check_size(size: int) -> None:
        if size > MAX_BODY:
            raise HTTPException(413, f"the body is larger than {MAX_BODY} bytes; send a smaller request")


def named_outside_body(headers: Any, query: bytes) -> str | None:
    """Return why an edit that headers or a query string name would be ignored, or None if they name none.

    Args:
        headers: Pairs of the name and the value of each header, in lower case.
        query: Query string of the request.

    Example:
        >>> named_outside_body([(b"x-sealign-edit", b"mild")], b"")
        'a header names an edit; send it as "vllm_xargs": {"sealign_edit": NAME}'
        >>> named_outside_body([(b"host", b"localhost")], b"priority=1")
    """
    names = b" ".join(name for name, _ in headers).decode("latin-1")
    for place, text in (("a header", names), ("the query string", unquote_plus(query.decode("latin-1")))):
        if REQUEST_KEY in text.lower().replace("-", "_"):
            return f"{place} names an edit; {_REMEDY}"
    return None


def why_ignored(path: str, body: bytes) -> str | None:
    """Return why vLLM would ignore the edit that a body names, or None if it would not or no edit is named.

    Args:
        path: Path of the request.
        body: Body of the request.

    Example:
        >>> why_ignored("/v1/completions", b'{"sealign_edit": "mild"}')
        'the request names an edit outside vllm_xargs; send it as "vllm_xargs": {"sealign_edit": NAME}'
        >>> why_ignored("/v1/completions", b'{"vllm_xargs": {"sealign_edit": "mild"}}')
    """
    # Quotes inside a JSON string are escaped, so this finds keys and whole values only.
    if f'"{REQUEST_KEY}"'.encode() not in body:
        return None
    try:
        request = json.loads(body)
    except RecursionError:
        return "the request is nested too deeply; send a simpler one"
    except ValueError:
        return None  # vLLM itself rejects it
    if not isinstance(request, dict):
        return None
    extra = request.get("vllm_xargs")
    if not isinstance(extra, dict) or REQUEST_KEY not in extra:
        return f"the request names an edit outside vllm_xargs; {_REMEDY}"
    if not path.endswith(_GENERATING):
        return f"{path} takes no edits; use /v1/chat/completions or /v1/completions"
    if request.get("use_beam_search"):
        return "beam search ignores vllm_xargs, so the edit would do nothing; leave out use_beam_search"
    return None
