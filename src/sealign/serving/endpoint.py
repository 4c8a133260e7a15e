"""The server's routes for its administrator: list, load and unload edits while the server runs."""

from __future__ import annotations

import hmac
import os
from argparse import Namespace
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, ClassVar

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict

from sealign.errors import SealignError, ServingError, UnknownEditError
from sealign.serving.edit_loader import EditLoader
from sealign.serving.ignored_edit import RejectIgnoredEdit
from sealign.serving.served_edits import SERVED, ServedEdit
from sealign.serving.settings import PLUGIN, TOKEN_VARIABLE, ServerSettings, find_in_edits_dir

ROUTE = "/sealign/edits"


class LoadRequest(BaseModel):
    """Body of a request to load an edit: its name in the folder of ``--edits-dir``, never a path."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str


class EditEndpoint:
    """Sealign's routes and their state, in the form of vLLM's entry point group ``vllm.endpoint_plugins``."""

    name = PLUGIN
    required_tasks: tuple[str, ...] = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes and the check for ignored edits."""
        app.add_middleware(RejectIgnoredEdit)
        router = APIRouter(prefix=ROUTE, route_class=AdministratorRoute)
        router.add_api_route("", _list, methods=["GET"])
        router.add_api_route("", _load, methods=["POST"])
        router.add_api_route("/{name}", _unload, methods=["DELETE"])
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Load the edits that the server starts with; an error stops the server."""
        settings = ServerSettings.from_environment()
        state.sealign = EditLoader(engine_client, state.openai_serving_models, settings, SERVED)
        count = getattr(args, "api_server_count", None)
        if count not in (None, 1):
            raise ServingError(
                f"--api-server-count is {count}, but edits are known to one front end only; leave it out"
            )
        for name, folder in state.sealign.settings.edits.items():
            await state.sealign.load(name, Path(folder))


class AdministratorRoute(APIRoute):
    """A route that needs the administrator's token, which is checked before the body is read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of the route behind a check of the token."""
        handler = super().get_route_handler()

        async def checked(request: Request) -> Response:
            _check_administrator(request)
            return await handler(request)

        return checked


def _check_administrator(request: Request) -> None:
    """Raise unless the request has the administrator's token."""
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        raise HTTPException(
            403, f"the server was started without {TOKEN_VARIABLE}, so its edits cannot be listed or changed"
        )
    given = request.headers.get("authorization", "")
    if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise HTTPException(
            401, "this route needs the header 'Authorization: Bearer TOKEN' with the administrator's token"
        )


_DESCRIBED = ("name", "hash", "route", "in_flight", "compared_with", "difference")
"""Attributes of ``ServedEdit`` that the routes return."""


def _describe(edit: ServedEdit) -> dict[str, Any]:
    return {name: getattr(edit, name) for name in _DESCRIBED}


async def _list() -> list[dict[str, Any]]:
    return [_describe(edit) for edit in SERVED.edits]


async def _load(body: LoadRequest, request: Request) -> dict[str, Any]:
    loader: EditLoader = request.app.state.sealign
    try:
        return _describe(await loader.load(body.name, find_in_edits_dir(loader.settings.edits_dir, body.name)))
    except UnknownEditError as error:
        raise HTTPException(404, str(error)) from error
    except SealignError as error:
        raise HTTPException(409, str(error)) from error


async def _unload(name: str, request: Request) -> dict[str, Any]:
    loader: EditLoader = request.app.state.sealign
    try:
        return _describe(await loader.unload(name))
    except UnknownEditError as error:
        raise HTTPException(404, str(error)) from error
    except SealignError as error:
        raise HTTPException(409, str(error)) from error
