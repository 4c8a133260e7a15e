"""RejectIgnoredEdit: a check of requests whose edit vLLM would ignore."""

from __future__ import annotations

import json
from typing import Any

from sealign.serving.settings import REQUEST_KEY

_GENERATING = ("/chat/completions", "/completions", "/responses", "/messages")
"""Ends of the paths whose requests can name an edit."""


class RejectIgnoredEdit:
    """ASGI middleware that rejects a request that names an edit where vLLM ignores it.

    Args:
        app: The application that answers the other requests.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request with status 400 if its edit would be ignored, otherwise pass it on unchanged."""
        if scope["type"] != "http" or scope["method"] != "POST" or not _is_json(scope):
            await self._app(scope, receive, send)
            return
        body, ended = b"", False
        while not ended:
            message = await receive()
            body += message.get("body", b"")
            ended = message["type"] == "http.disconnect" or not message.get("more_body", False)
        reason = why_ignored(scope["path"], body)
        if reason is not None:
            await _reject(reason, send)
            return
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        await self._app(scope, lambda: _replay(messages, receive), send)


def _is_json(scope: Any) -> bool:
    """Return whether the body is JSON; in other bodies, such as audio forms, vLLM finds ``vllm_xargs`` itself."""
    return b"json" in dict(scope["headers"]).get(b"content-type", b"").lower()


async def _reject(reason: str, send: Any) -> None:
    """Answer with status 400, in the form of vLLM's own errors."""
    error = {"message": reason, "type": "BadRequestError", "param": "vllm_xargs", "code": 400}
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})


async def _replay(messages: list[dict[str, Any]], receive: Any) -> Any:
    """Return the stored message first, and then what the client sends."""
    return messages.pop() if messages else await receive()


def why_ignored(path: str, body: bytes) -> str | None:
    """Return why vLLM would ignore the edit that a request names, or None if it would not or no edit is named.

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
    except ValueError:
        return None  # vLLM itself rejects it
    if not isinstance(request, dict):
        return None
    extra = request.get("vllm_xargs")
    if not isinstance(extra, dict) or REQUEST_KEY not in extra:
        return f'the request names an edit outside vllm_xargs; send it as "vllm_xargs": {{"{REQUEST_KEY}": NAME}}'
    if not path.endswith(_GENERATING):
        return f"{path} takes no edits; use /v1/chat/completions or /v1/completions"
    if request.get("use_beam_search"):
        return "beam search ignores vllm_xargs, so the edit would do nothing; leave out use_beam_search"
    return None
