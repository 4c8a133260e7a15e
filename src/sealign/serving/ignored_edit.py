"""The check that no request's edit is overlooked: vLLM drops what it does not know."""

from __future__ import annotations

import json
from typing import Any

from sealign.serving.settings import REQUEST_KEY

_GENERATING = ("/chat/completions", "/completions", "/responses", "/messages")


class RejectIgnoredEdit:
    """Refuses a request that names an edit where vLLM would not look for one, so that it never silently does nothing.

    Args:
        app: the application that answers.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, as ASGI has it."""
        if scope["type"] != "http" or scope["method"] != "POST" or not _is_json(scope):
            await self._app(scope, receive, send)
            return
        body, ended = b"", False
        while not ended:
            message = await receive()
            body += message.get("body", b"")
            ended = message["type"] == "http.disconnect" or not message.get("more_body", False)
        complaint = overlooked(scope["path"], body)
        if complaint is not None:
            await _refuse(complaint, send)
            return
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        await self._app(scope, lambda: _replay(messages, receive), send)


def _is_json(scope: Any) -> bool:
    """Whether a body is JSON; of others, such as recordings, the engine reads ``vllm_xargs`` itself."""
    return b"json" in dict(scope["headers"]).get(b"content-type", b"").lower()


async def _refuse(complaint: str, send: Any) -> None:
    """Answer with status 400, in the form of the server's other errors."""
    error = {"message": complaint, "type": "BadRequestError", "param": "vllm_xargs", "code": 400}
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})


async def _replay(messages: list[dict[str, Any]], receive: Any) -> Any:
    return messages.pop() if messages else await receive()


def overlooked(path: str, body: bytes) -> str | None:
    """Return why the edit that a request names would be overlooked, None if it would not or names none.

    Args:
        path: of the request.
        body: of the request.

    Example:
        >>> overlooked("/v1/completions", b'{"sealign_edit": "mild"}')
        'the request names an edit outside vllm_xargs; send it as "vllm_xargs": {"sealign_edit": NAME}'
        >>> overlooked("/v1/completions", b'{"vllm_xargs": {"sealign_edit": "mild"}}')
    """
    # Inside a JSON string its quotes would have backslashes, so this finds keys and whole values only.
    if f'"{REQUEST_KEY}"'.encode() not in body:
        return None
    try:
        request = json.loads(body)
    except ValueError:
        return None  # which vLLM refuses itself
    if not isinstance(request, dict):
        return None
    extra = request.get("vllm_xargs")
    if not isinstance(extra, dict) or REQUEST_KEY not in extra:
        return f'the request names an edit outside vllm_xargs; send it as "vllm_xargs": {{"{REQUEST_KEY}": NAME}}'
    if not path.endswith(_GENERATING):
        return f"{path} takes no edits; use /v1/chat/completions or /v1/completions"
    if request.get("use_beam_search"):
        return "beam search does not carry vllm_xargs, so that the edit would do nothing; leave out use_beam_search"
    return None
