"""The server of the playground's page, on an address of this machine."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import uvicorn

from sealign.errors import SettingError
from sealign.playground.application import playground_application

if TYPE_CHECKING:
    from sealign.playground.playground import Playground
    from sealign.playground.served_playground import ServedPlayground


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address, before a model is loaded in vain.

    Args:
        host: Name or address of this machine.
        port: Port; 0 takes a free one.

    Raises:
        SettingError: The address is not of this machine, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise SettingError(f"--host is '{host}', but it must be an address of this machine; try 127.0.0.1") from error
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        opened.close()
        reason = (error.strerror or str(error)).lower()
        raise SettingError(f"cannot listen at {host}, port {port}: {reason}; choose another --port") from error
    return opened


def serve_page(
    playground: Playground | ServedPlayground, bound: socket.socket, *, host: str, on_start: Callable[[str], None]
) -> None:
    """Serve the page until the process is interrupted.

    Args:
        playground: Model and edits, here or on a server.
        bound: Socket of ``open_socket``.
        host: Name or address that the socket was opened with.
        on_start: Function that is called with the address of the page when it can be opened.
    """
    application = playground_application(playground, host=host)
    # No access log: what a user asks a model is nobody else's business.
    config = uvicorn.Config(
        application, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=2, ws="none"
    )
    port = bound.getsockname()[1]
    name = f"[{host}]" if ":" in host else host

    def stop_jobs() -> None:
        application.state.queue.close()
        application.state.uploads.close()

    server = _Server(config, lambda: on_start(f"http://{name}:{port}/"), stop_jobs)
    with suppress(KeyboardInterrupt):  # raised again by the server after its shutdown
        server.run(sockets=[bound])


class _Server(uvicorn.Server):
    """Server that says when it has started, and stops the jobs before it waits for their streams to end."""

    def __init__(self, config: uvicorn.Config, say_started: Callable[[], None], stop_jobs: Callable[[], None]) -> None:
        super().__init__(config)
        self._say_started = say_started
        self._stop_jobs = stop_jobs

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        if self.started:
            self._say_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop the jobs, then the server."""
        await asyncio.to_thread(self._stop_jobs)
        await super().shutdown(sockets)
