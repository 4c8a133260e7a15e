"""The server's routes for its administrator: edits listed, loaded and unloaded while it runs."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel, ConfigDict

from sealign.edits.edit import Edit
from sealign.errors import SealignError, ServingError, UnknownEditError
from sealign.models.fingerprint import check_fingerprint
from sealign.serving.ignored_edit import RejectIgnoredEdit
from sealign.serving.served_edits import Registry, ServedEdit, registry
from sealign.serving.settings import PLUGIN, TOKEN_VARIABLE, ServerSettings, check_name, find_in_library, is_lora

ROUTE = "/sealign/edits"


class LoadRequest(BaseModel):
    """The body of a request to load an edit: its name in the folder of ``--edits-dir``, never a path."""

    model_config = ConfigDict(extra="forbid")

    name: str


class EditEndpoint:
    """What vLLM's group ``vllm.endpoint_plugins`` asks for: routes, and their state once the engine runs."""

    name = PLUGIN
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes and the check of requests."""
        allowed = [Depends(_administrator)]
        app.add_middleware(RejectIgnoredEdit)
        app.add_api_route(ROUTE, _list, methods=["GET"], dependencies=allowed)
        app.add_api_route(ROUTE, _load, methods=["POST"], dependencies=allowed)
        app.add_api_route(f"{ROUTE}/{{name}}", _unload, methods=["DELETE"], dependencies=allowed)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Load the edits that the server starts with; one that fails keeps it from starting."""
        state.sealign = EditLoader(
            engine_client, state.openai_serving_models, ServerSettings.from_environment(), registry
        )
        if getattr(args, "api_server_count", None) not in (None, 1):
            raise ServingError("edits are known to one front end, but --api-server-count asks for more; leave it at 1")
        for name, folder in state.sealign.settings.edits.items():
            await state.sealign.load(name, Path(folder))


class EditLoader:
    """Loads edits into the running engine and takes them out, by the route that suits each.

    Args:
        engine: vLLM's client of the engine.
        models: vLLM's register of base models and adapters.
        settings: of the server.
        edits: where requests find them.
    """

    def __init__(self, engine: Any, models: Any, settings: ServerSettings, edits: Registry) -> None:
        self.settings = settings
        self.edits = edits
        self._engine = engine
        self._models = models
        self._lock = asyncio.Lock()
        self._model: Any = None

    async def load(self, name: str, folder: Path) -> ServedEdit:
        """Load an edit from a folder that the operator named.

        Raises:
            SealignError: it does not fit the model or the server; nothing has changed then.
        """
        async with self._lock:
            edit = await asyncio.to_thread(Edit.from_pretrained, folder)
            if self._models.is_base_model(check_name(name)):
                raise ServingError(f"'{name}' is the name of the base model; choose another for the edit")
            self.edits.check_new(name, edit.hash)
            await asyncio.to_thread(self._check_model, edit)
            uses_adapter = is_lora(edit) and self._engine.vllm_config.lora_config is not None
            served = await (self._load_adapter if uses_adapter else self._load_into_bank)(name, folder, edit)
            self.edits.add(served)
            return served

    async def unload(self, name: str) -> ServedEdit:
        """Refuse an edit to new requests, wait for those that run with it, and take it out.

        Raises:
            UnknownEditError: there is no such edit.
        """
        edit = self.edits.retire(name)
        if edit.route == "lora":
            from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest

            await self._models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name))
        await edit.idle()
        async with self._lock:
            if edit.route == "lora":
                await self._engine.remove_lora(edit.adapter.lora_int_id)
            else:
                await self._engine.collective_rpc("sealign_unload_edit", args=(edit.hash,))
            self.edits.forget(edit)
        return edit

    def _check_model(self, edit: Edit) -> None:
        """Raise where the served model is not the one that the edit was fitted on."""
        import torch
        from transformers import AutoModelForCausalLM

        if self._model is None:
            with torch.device("meta"):
                self._model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                    self._engine.vllm_config.model_config.hf_config
                )
        check_fingerprint(self._model, edit.record.model.fingerprint, edit.record.model.id)

    async def _load_into_bank(self, name: str, folder: Path, edit: Edit) -> ServedEdit:
        try:
            loaded = await self._engine.collective_rpc("sealign_load_edit", args=(str(folder),))
        except Exception as error:  # vLLM passes a worker's error on as its text, in a type of its own
            await self._engine.collective_rpc("sealign_unload_edit", args=(edit.hash,))  # from those that did load it
            raise ServingError(f"a worker cannot load the edit '{name}': {error}") from error
        if set(loaded) != {edit.hash}:
            for other in set(loaded):
                await self._engine.collective_rpc("sealign_unload_edit", args=(other,))
            raise ServingError(f"'{folder}' changed while it was read; load it again")
        return ServedEdit(name, edit.hash, "plugin")

    async def _load_adapter(self, name: str, folder: Path, edit: Edit) -> ServedEdit:
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        # vLLM keys cached blocks by the adapter's name and path, so the path tells edit and weights apart.
        weights = Path(self._engine.vllm_config.model_config.model)
        adapter = Path(self.settings.adapters) / adapter_key(edit, weights)
        if not adapter.is_dir():
            await _export_adapter(folder, self.settings.model, adapter)
        answer = await self._models.load_lora_adapter(LoadLoRAAdapterRequest(lora_name=name, lora_path=str(adapter)))
        if isinstance(answer, ErrorResponse):
            raise ServingError(f"the server cannot load the edit '{name}' as a LoRA: {answer.error.message}")
        return ServedEdit(name, edit.hash, "lora", self._models.lora_requests[name])


def adapter_key(edit: Edit, weights: Path) -> str:
    """Return a name for the LoRA of an edit on the weights in a folder, which are part of the LoRA.

    Args:
        edit: the edit.
        weights: folder of the base model's safetensors, told apart by size and time.
    """
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights.glob("*.safetensors"))
    return hashlib.sha256(json.dumps([edit.hash, str(weights), files]).encode()).hexdigest()


async def _export_adapter(folder: Path, model: str, adapter: Path) -> None:
    """Make an edit's LoRA in a process of its own, which gives the model's memory back when it ends."""
    command = ["-m", "sealign", "export", "lora", "--edit", str(folder), "--model", model, "--output", str(adapter)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await process.communicate()
    if process.returncode:
        raise ServingError(f"cannot make a LoRA of the edit in '{folder}': {errors.decode(errors='replace').strip()}")


async def _administrator(request: Request) -> None:
    """Let only who has the token of the server's environment pass; async, so that it waits for no thread."""
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        raise HTTPException(403, f"the server was started without {TOKEN_VARIABLE}, so that edits stay as they are")
    given = request.headers.get("authorization", "")
    if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise HTTPException(401, "this needs 'Authorization: Bearer TOKEN' with the administrator's token")


def _described(edit: ServedEdit) -> dict[str, Any]:
    return {"name": edit.name, "hash": edit.hash, "route": edit.route, "in_flight": edit.in_flight}


async def _list() -> list[dict[str, Any]]:
    return [_described(edit) for edit in registry.edits]


async def _load(body: LoadRequest, request: Request) -> dict[str, Any]:
    loader: EditLoader = request.app.state.sealign
    try:
        return _described(await loader.load(body.name, find_in_library(loader.settings.library, body.name)))
    except UnknownEditError as error:
        raise HTTPException(404, str(error)) from error
    except SealignError as error:
        raise HTTPException(409, str(error)) from error


async def _unload(name: str, request: Request) -> dict[str, Any]:
    loader: EditLoader = request.app.state.sealign
    try:
        return _described(await loader.unload(name))
    except UnknownEditError as error:
        raise HTTPException(404, str(error)) from error
