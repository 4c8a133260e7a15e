"""The server's routes for its administrator: list, load and unload edits while the server runs."""

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
from sealign.serving.served_edits import SERVED, ServedEdit, ServedEdits
from sealign.serving.settings import PLUGIN, TOKEN_VARIABLE, ServerSettings, check_name, find_in_edits_dir, is_lora

ROUTE = "/sealign/edits"


class LoadRequest(BaseModel):
    """Body of a request to load an edit: its name in the folder of ``--edits-dir``, never a path."""

    model_config = ConfigDict(extra="forbid")

    name: str


class EditEndpoint:
    """Sealign's routes and their state, in the form of vLLM's entry point group ``vllm.endpoint_plugins``."""

    name = PLUGIN
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes and the check for ignored edits."""
        allowed = [Depends(_administrator)]
        app.add_middleware(RejectIgnoredEdit)
        app.add_api_route(ROUTE, _list, methods=["GET"], dependencies=allowed)
        app.add_api_route(ROUTE, _load, methods=["POST"], dependencies=allowed)
        app.add_api_route(f"{ROUTE}/{{name}}", _unload, methods=["DELETE"], dependencies=allowed)

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


class EditLoader:
    """Loading and unloading of edits in the running engine, as LoRAs or in slots.

    Args:
        engine: vLLM's client of the engine.
        models: vLLM's ``OpenAIServingModels``, which knows base models and adapters.
        settings: Settings of the server.
        edits: The edits that requests can name.
    """

    def __init__(self, engine: Any, models: Any, settings: ServerSettings, edits: ServedEdits) -> None:
        self.settings = settings
        self.edits = edits
        self._engine = engine
        self._models = models
        self._lock = asyncio.Lock()
        self._model: Any = None

    async def load(self, name: str, folder: Path) -> ServedEdit:
        """Load an edit from a folder.

        Args:
            name: Name of the edit in requests.
            folder: Folder of the edit, chosen by the operator of the server.

        Raises:
            SealignError: The edit does not fit the model or the server; nothing has changed.
        """
        async with self._lock:
            edit = await asyncio.to_thread(Edit.from_pretrained, folder)
            if self._models.is_base_model(check_name(name)):
                raise ServingError(f"'{name}' is the name of the base model; choose another for the edit")
            self.edits.check_new(name, edit.hash)
            await asyncio.to_thread(self._check_model, edit)
            uses_adapter = is_lora(edit) and self._engine.vllm_config.lora_config is not None
            served = await (self._load_adapter if uses_adapter else self._load_into_slot)(name, folder, edit)
            self.edits.add(served)
            return served

    async def unload(self, name: str) -> ServedEdit:
        """Refuse an edit to new requests, wait for the running ones, and unload it.

        Args:
            name: Name of the edit.

        Raises:
            UnknownEditError: There is no edit of this name.
        """
        edit = self.edits.retire(name)
        if edit.route == "lora":
            from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest

            await self._models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name))
        await edit.wait_until_idle()
        async with self._lock:
            if edit.route == "lora":
                await self._engine.remove_lora(edit.adapter.lora_int_id)
            else:
                await self._engine.collective_rpc("sealign_unload_edit", args=(edit.hash,))
            self.edits.remove(edit)
        return edit

    def _check_model(self, edit: Edit) -> None:
        """Raise FingerprintError if the served model is not the one that the edit was fitted on."""
        import torch
        from transformers import AutoModelForCausalLM

        if self._model is None:
            with torch.device("meta"):
                self._model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                    self._engine.vllm_config.model_config.hf_config
                )
        check_fingerprint(self._model, edit.base_model.fingerprint, edit.base_model.id)

    async def _load_into_slot(self, name: str, folder: Path, edit: Edit) -> ServedEdit:
        try:
            loaded = await self._engine.collective_rpc("sealign_load_edit", args=(str(folder),))
        except Exception as error:  # vLLM wraps the error of a worker in a type of its own
            await self._engine.collective_rpc("sealign_unload_edit", args=(edit.hash,))  # other workers may have it
            raise ServingError(f"a worker cannot load the edit '{name}': {error}") from error
        if set(loaded) != {edit.hash}:
            for other in set(loaded):
                await self._engine.collective_rpc("sealign_unload_edit", args=(other,))
            raise ServingError(f"'{folder}' changed while it was read; load it again")
        return ServedEdit(name, edit.hash, "plugin")

    async def _load_adapter(self, name: str, folder: Path, edit: Edit) -> ServedEdit:
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        # vLLM keys cached blocks by the adapter's name and path, so the path must identify the edit and the weights.
        weights = Path(self._engine.vllm_config.model_config.model)
        adapter = Path(self.settings.adapters_dir) / adapter_key(edit, weights)
        if not adapter.is_dir():
            await _export_adapter(folder, self.settings.model, adapter)
        answer = await self._models.load_lora_adapter(LoadLoRAAdapterRequest(lora_name=name, lora_path=str(adapter)))
        if isinstance(answer, ErrorResponse):
            raise ServingError(f"the server cannot load the edit '{name}' as a LoRA: {answer.error.message}")
        return ServedEdit(name, edit.hash, "lora", self._models.lora_requests[name])


def adapter_key(edit: Edit, weights: Path) -> str:
    """Return a key for the LoRA of an edit; it differs for other weights, since A = right W contains them.

    Args:
        edit: The edit.
        weights: Folder of the base model's safetensors, which are identified by size and time of change.
    """
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights.glob("*.safetensors"))
    return hashlib.sha256(json.dumps([edit.hash, str(weights), files]).encode()).hexdigest()


async def _export_adapter(folder: Path, model: str, adapter: Path) -> None:
    """Export an edit as a LoRA in a process of its own, so that the memory of the model is freed afterwards."""
    command = ["-m", "sealign", "export", "lora", "--edit", str(folder), "--model", model]
    command += ["--output", str(adapter), "--device", "cpu"]  # the memory of the device is the engine's
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await process.communicate()
    if process.returncode:
        raise ServingError(f"cannot export the edit in '{folder}' as a LoRA: {errors.decode(errors='replace').strip()}")


async def _administrator(request: Request) -> None:
    """Raise unless the request has the administrator's token; async, so that it does not wait for a thread."""
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


def _describe(edit: ServedEdit) -> dict[str, Any]:
    return {"name": edit.name, "hash": edit.hash, "route": edit.route, "in_flight": edit.in_flight}


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
