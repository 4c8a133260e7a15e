"""RejectIgnoredEdit: a check of requests whose edit vLLM would ignore."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import unquote_plus

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from sealign.serving.settings import PLUGIN, REQUEST_KEY

MAX_BODY = 32 * 2**20
"""Largest body of a request, in bytes; forms with audio are not limited."""

_GENERATING = ("/chat/completions", "/completions", "/responses", "/messages")
"""Ends of the paths whose requests can name an edit."""

_NAMES_EDIT = re.compile(rb'"[a-z_-]{0,8}sealign[_-]?edits?"', re.IGNORECASE)
"""A key, or a whole value, that names an edit; quotes inside a JSON string are escaped."""

_NAMES_KEY = re.compile(_NAMES_EDIT.pattern + rb"\s*:", re.IGNORECASE)

_DISGUISED = re.compile(rb"\\u00[67][0-9a-f]|\\u005f|\\u002d|\x00", re.IGNORECASE)
"""Letters that are escaped without need, or a JSON text in UTF-16 or UTF-32."""

_REMEDY = f'send it as "vllm_xargs": {{"{REQUEST_KEY}": NAME}}'


_TOO_DEEP = "the request is nested too deeply; send a simpler one"


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
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_noted(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, _CheckedBody(scope, receive), send_noted)
        except RecursionError:  # of routes that read the body as JSON themselves
            if started:
                raise
            await JSONResponse({"detail": _TOO_DEEP}, 400)(scope, receive, send)


class _CheckedBody:
    """The ``receive`` of a request, which raises an HTTP error in place of the end of a body that must be rejected."""

    def __init__(self, scope: Any, receive: Any) -> None:
        self._scope = scope
        self._receive = receive
        kind = dict(scope["headers"]).get(b"content-type", b"").lower()
        # In forms, those with audio, vLLM finds ``vllm_xargs`` itself. Other routes may read JSON whatever its type.
        self._checked = not (kind.startswith(b"multipart/") and "/audio/" in scope["path"])
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
    disguised = _DISGUISED.search(body) is not None
    if not disguised and not _NAMES_EDIT.search(body):
        return None
    try:
        request = json.loads(body)
    except RecursionError:
        return _TOO_DEEP
    except ValueError:
        return None  # vLLM itself rejects it
    if not isinstance(request, dict) or (disguised and not _NAMES_EDIT.search(json.dumps(request).encode())):
        return None
    extra = request.get("vllm_xargs")
    if not isinstance(extra, dict) or not any(key.lower().startswith(PLUGIN) for key in extra):
        return f"the request names an edit outside vllm_xargs; {_REMEDY}"
    rest = request | {"vllm_xargs": list(extra.values())}
    if _NAMES_KEY.search(json.dumps(rest).encode()):
        return f"the request names an edit in vllm_xargs and outside it; {_REMEDY}"
    if not path.endswith(_GENERATING):
        return f"{path} takes no edits; use /v1/chat/completions or /v1/completions"
    if request.get("use_beam_search"):
        return "beam search ignores vllm_xargs, so the edit would do nothing; leave out use_beam_search"
    return None
