"""LocalRequests: a check that requests come from the playground's own page, and headers that confine the page."""

from __future__ import annotations

import ipaddress
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
"""Headers of every response."""


def is_loopback(host: str) -> bool:
    """Return whether a server that listens at a name or address is reached from this machine alone.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0")
        (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class LocalRequests:
    """ASGI middleware that answers only what the page itself asks.

    A web site that the user visits could let its own name stand for the address of this machine (DNS rebinding), or
    send requests to it. The first has a ``Host`` that is neither an address nor known, the second an ``Origin`` that is
    not the page's own.

    Args:
        app: The application that answers the requests.
        host: Name or address that the server was started with.
    """

    def __init__(self, app: Any, *, host: str) -> None:
        self._app = app
        self._names = {"localhost", host.lower()}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or refuse it with status 403."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        reason = self._why_foreign(Headers(scope=scope))
        app = self._app if reason is None else JSONResponse({"error": reason}, status_code=403)
        await app(scope, receive, send_with_headers)

    def _why_foreign(self, headers: Headers) -> str | None:
        """Return why a request is refused, or None."""
        host = headers.get("host", "")
        if not self._is_known(_without_port(host)):
            return f"the host '{host[:100]}' is not that of this playground; open the address that it printed"
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return f"the request is from another site, '{origin[:100]}'; open the address that the playground printed"
        return None

    def _is_known(self, name: str) -> bool:
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True  # no name that could be made to stand for this machine


def _without_port(host: str) -> str:
    """Return the name or address in a ``Host`` header, in lower case and without the brackets of IPv6."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
