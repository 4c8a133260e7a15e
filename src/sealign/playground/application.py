"""The web application of the playground: its page, and the jobs that the page asks for, as streams of events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sealign.demonstrations.prompts import bundled_prompts
from sealign.errors import SealignError, ServingError, SettingError
from sealign.playground.local_requests import LocalRequests, is_loopback
from sealign.playground.model_queue import Job, ModelQueue
from sealign.playground.page_requests import (
    MAX_BODY,
    MAX_NEW_TOKENS,
    AnswerRequest,
    Body,
    DownloadRequest,
    EditsRequest,
    EffectsRequest,
    FitRequest,
    FormsRequest,
    LoadRequest,
    PushRequest,
    SaveRequest,
    SearchRequest,
    read_request,
)

if TYPE_CHECKING:
    from sealign.playground.playground import Playground
    from sealign.playground.served_playground import ServedPlayground

_FILES = {"/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css")}
_FILES |= {
    f"/{name}": (name, "text/javascript")
    for name in (
        "page.js",
        "answers.js",
        "settings.js",
        "fitting.js",
        "layer_map.js",
        "table_editor.js",
        "edit_files.js",
    )
}


def playground_application(playground: Playground | ServedPlayground, *, host: str = "127.0.0.1") -> Starlette:
    """Return the application that serves the page of a playground and its requests.

    Its jobs are in ``state.queue``, and those that upload in ``state.uploads``.

    Args:
        playground: Model and edits, here or on a server.
        host: Name or address that the server is started with.
    """
    queue, uploads = ModelQueue(playground.at_once), ModelQueue()
    push_obstacle = None if is_loopback(host) else "Edits are pushed only from a page at 127.0.0.1, not at " + host

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        queue.close()
        uploads.close()

    async def describe(_: Request) -> Response:
        limits = {"max_new_tokens": MAX_NEW_TOKENS, "max_body": MAX_BODY, "presets": bundled_prompts()}
        limits["push_obstacle"] = push_obstacle
        return JSONResponse(await run_in_threadpool(playground.describe) | limits)

    def push(request: PushRequest, job: Job) -> None:
        if push_obstacle is not None:  # whoever reaches the page would use the login of this machine
            raise SettingError(push_obstacle)
        playground.push(request, job)

    routes = [Route(path, _file(*entry)) for path, entry in _FILES.items()]
    routes.append(Route("/api/playground", describe))
    routes += [
        Route("/api/answer", _job(queue, AnswerRequest, playground.answer), methods=["POST"]),
        Route("/api/effects", _job(queue, EffectsRequest, playground.effects), methods=["POST"]),
        Route("/api/damage", _job(queue, EditsRequest, playground.damage), methods=["POST"]),
        Route("/api/load", _job(queue, LoadRequest, playground.load), methods=["POST"]),
        Route("/api/fit", _job(queue, FitRequest, playground.fit), methods=["POST"]),
        Route("/api/search", _job(queue, SearchRequest, playground.search), methods=["POST"]),
        Route("/api/forms", _job(queue, FormsRequest, playground.forms), methods=["POST"]),
        Route("/api/download", _file_job(queue, DownloadRequest, playground.download), methods=["POST"]),
        Route("/api/push", _job(uploads, PushRequest, push), methods=["POST"]),
        Route("/api/save", _job(queue, SaveRequest, playground.save), methods=["POST"]),
    ]
    application = Starlette(
        routes=routes,
        middleware=[Middleware(LocalRequests, host=host)],
        exception_handlers={HTTPException: _refuse},
        lifespan=lifespan,
    )
    application.state.queue, application.state.uploads = queue, uploads
    return application


def _file(name: str, media_type: str) -> Callable[[Request], Any]:
    """Return the handler of a file of the page."""
    content = (files("sealign.playground") / "page" / name).read_bytes()

    async def serve(_: Request) -> Response:
        return Response(content, media_type=media_type)

    return serve


def _job(queue: ModelQueue, kind: type[Body], task: Callable[[Body, Job], None]) -> Callable[[Request], Any]:
    """Return the handler that reads a request of a kind, queues its task and streams its events."""

    async def handle(request: Request) -> Response:
        return _Events(_submit(queue, partial(task, await _read(kind, request))))

    return handle


def _file_job(queue: ModelQueue, kind: type[Body], task: Callable[..., None]) -> Callable[[Request], Any]:
    """Return the handler that reads a request of a kind, queues its task and sends the file that it has written."""

    async def handle(request: Request) -> Response:
        found = await _read(kind, request)
        folder = TemporaryDirectory(prefix="sealign-download-")
        try:
            job = _submit(queue, partial(task, found, folder=Path(folder.name)))
            events = {event["event"]: event async for event in job.events()}
            if "finished" not in events:
                reason = events.get("error", {"message": "the playground has ended; start it again"})["message"]
                raise HTTPException(400, reason)
            return _TemporaryFile(Path(events["file"]["path"]), folder)
        except BaseException:
            folder.cleanup()
            raise

    return handle


async def _read(kind: type[Body], request: Request) -> Body:
    """Return the request of a kind in the body of a web request."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "the body must be JSON; set the header content-type: application/json")
    body = await _read_body(request)
    try:
        return read_request(kind, body)
    except SealignError as error:
        raise HTTPException(400, str(error)) from error


def _submit(queue: ModelQueue, task: Callable[[Job], None]) -> Job:
    try:
        return queue.submit(task)
    except ServingError as error:
        raise HTTPException(503, str(error)) from error


async def _read_body(request: Request) -> bytes:
    """Return the body of a request, of which no more than the limit is read."""
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > MAX_BODY:
            raise HTTPException(
                413, f"the body is larger than {MAX_BODY} bytes; start a new conversation, or use sealign fit"
            )
        pieces.append(piece)
    return b"".join(pieces)


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code)


class _TemporaryFile(FileResponse):
    """A file to download, in a folder that is removed when it has been sent or the page has gone."""

    def __init__(self, path: Path, folder: TemporaryDirectory[str]) -> None:
        self._folder = folder
        super().__init__(path, media_type="application/octet-stream", filename=path.name)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._folder.cleanup()


class _Events(StreamingResponse):
    """The events of a job, a line of JSON each. The job is stopped when the page goes or no longer reads."""

    def __init__(self, job: Job) -> None:
        self._job = job
        super().__init__(self._lines(), media_type="application/x-ndjson")

    async def _lines(self) -> AsyncIterator[str]:
        async for event in self._job.events():
            yield json.dumps(event, allow_nan=False) + "\n"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.stop()
