"""EditLoader: loading and unloading of edits in the running engine, as LoRAs or in slots."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from sealign.edits.edit import Edit
from sealign.edits.provenance import warn_of_other_checkpoint
from sealign.errors import ServingError
from sealign.models.checkpoint_tensors import checkpoint_tensors, weight_files
from sealign.models.fingerprint import check_fingerprint
from sealign.models.pretrained import empty_model
from sealign.models.weights import stored_weights
from sealign.serving.canary import COMPLETION, PROMPT, Canary, CanaryAnswer, check_canary, check_changes
from sealign.serving.served_edits import ServedEdit, ServedEdits
from sealign.serving.settings import PLUGIN_PATH, REQUEST_KEY, ServerSettings, check_name, is_lora

Result = TypeVar("Result")


class EditLoader:
    """Loading and unloading of edits in the running engine, as LoRAs or in slots.

    What has begun goes on to its end even if the caller is cancelled, so that nothing stays half loaded.

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
        self._running: set[asyncio.Task[Any]] = set()
        self._model: Any = None
        self._weights: tuple[str, str] | None = None
        self._canary = Canary.from_environment()

    async def load(self, name: str, folder: Path) -> ServedEdit:
        """Load an edit from a folder.

        Args:
            name: Name of the edit in requests.
            folder: Folder of the edit, chosen by the operator of the server.

        Raises:
            SealignError: The edit does not fit the model or the server, or has no effect; nothing has changed.
        """
        return await self._to_its_end(self._load(name, folder))

    async def unload(self, name: str) -> ServedEdit:
        """Refuse an edit to new requests, wait for the running ones, and unload it.

        If the engine fails, the edit stays refused, and a second call tries again.

        Args:
            name: Name of the edit.

        Raises:
            UnknownEditError: There is no edit of this name.
            ServingError: The engine cannot unload it.
        """
        edit = self.edits.retire(name)
        if edit.route == "plugin":
            self._models.lora_requests.pop(name, None)
        return await self._to_its_end(self._unload(edit))

    async def _to_its_end(self, work: Coroutine[Any, Any, Result]) -> Result:
        task = asyncio.ensure_future(work)
        self._running.add(task)  # the event loop itself keeps no reference
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    async def _load(self, name: str, folder: Path) -> ServedEdit:
        async with self._lock:
            edit = await asyncio.to_thread(Edit.from_pretrained, folder)
            if self._models.is_base_model(check_name(name)):
                raise ServingError(f"'{name}' is the name of the base model; choose another for the edit")
            self.edits.check_new(name, edit.hash)
            await asyncio.to_thread(self._check_model, edit)
            uses_adapter = is_lora(edit) and self._engine.vllm_config.lora_config is not None
            served = await (self._load_adapter if uses_adapter else self._load_into_slot)(name, folder, edit)
            try:
                await self._check_acts(served, edit)
            except Exception as error:  # vLLM wraps the error of a worker in a type of its own
                await self._remove(served)
                if isinstance(error, ServingError):
                    raise
                raise ServingError(f"the engine cannot try the edit '{name}': {error}") from error
            if served.route == "plugin":
                self._models.lora_requests[name] = served.adapter  # selected by ``model``, and listed in /v1/models
            self.edits.add(served)
            return served

    async def _unload(self, edit: ServedEdit) -> ServedEdit:
        await edit.wait_until_idle()
        async with self._lock:
            if self.edits.is_retired(edit):  # another call may have unloaded it
                try:
                    await self._remove(edit)
                except Exception as error:  # vLLM wraps the error of a worker in a type of its own
                    raise ServingError(
                        f"the engine cannot unload the edit '{edit.name}': {error}; try again"
                    ) from error
                self.edits.remove(edit)
        return edit

    async def _remove(self, edit: ServedEdit) -> None:
        """Remove an edit from the engine; does nothing where it is not loaded."""
        if edit.route == "lora":
            from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest

            await self._models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=edit.name))
            await self._engine.remove_lora(edit.adapter.lora_int_id)
        else:
            await self._engine.collective_rpc("sealign_unload_edit", args=(edit.hash,))

    def _check_model(self, edit: Edit) -> None:
        """Raise FingerprintError if an edit was fitted on another model, and warn if on other weights of this one."""
        if self._model is None:
            served = self._engine.vllm_config.model_config
            self._model, folder = empty_model(served.hf_config), Path(served.model)
            if weight_files(folder):
                self._weights = stored_weights(self._model, checkpoint_tensors(folder, self._model))
        check_fingerprint(self._model, edit.base_model.fingerprint, edit.base_model.id)
        warn_of_other_checkpoint(self._weights, [edit])

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
        from vllm.lora.request import LoRARequest

        number = self._models.lora_id_counter.inc(1)
        return ServedEdit(name, edit.hash, "plugin", LoRARequest(name, number, f"{PLUGIN_PATH}{edit.hash}"))

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

    async def _check_acts(self, served: ServedEdit, edit: Edit) -> None:
        """Raise unless the server applies an edit as the hooks do, or, without their answers, as far as can be seen.

        vLLM ignores the weights of a LoRA whose names it does not find in its model.
        """
        if not edit.strength:
            return
        if served.route == "lora":
            found = await self._engine.collective_rpc("sealign_lora_modules", args=(served.adapter.lora_int_id,))
            modules = set().union(*found)
            if len(modules) < len(edit.layers):
                raise ServingError(
                    f"vLLM uses the LoRA of the edit '{served.name}' at {len(modules)} of {len(edit.layers)} modules, "
                    "as when vLLM names the modules of the model differently; start the server with --no-lora"
                )
        canary = self._canary
        known = canary is not None and edit.hash in canary.edited and self._logs_are_plain
        ids = canary.ids if canary is not None else self._engine.get_tokenizer().encode(PROMPT)
        with self.edits.on_trial(served) as trial:
            if known:  # in one batch, where each must keep to its own
                plain, edited = await asyncio.gather(self._answer(ids, None), self._answer(ids, trial))
            else:  # one after the other, where both are rounded alike: an edit that does nothing changes no bit
                plain, edited = await self._answer(ids, None), await self._answer(ids, trial)
        if canary is not None and known:
            served.difference = check_canary(served.name, plain, edited, canary, edit.hash)
            served.compared_with = "hooks"
        elif all(layer_edit.gate is None for layer_edit in edit.layer_edits.values()):
            check_changes(served.name, plain, edited)
            served.compared_with = "base model"

    @property
    def _logs_are_plain(self) -> bool:
        """Whether the server's log-probabilities are those of the model, before sampling settings change them."""
        return str(getattr(self._engine.vllm_config.model_config, "logprobs_mode", "")) == "raw_logprobs"

    async def _answer(self, ids: Sequence[int], name: str | None) -> CanaryAnswer:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input

        params = SamplingParams(
            max_tokens=COMPLETION,
            temperature=0,
            ignore_eos=True,
            logprobs=0,
            prompt_logprobs=0,
            skip_reading_prefix_cache=True,
            extra_args=None if name is None else {REQUEST_KEY: name},
        )
        answers = self._engine.generate(tokens_input(list(ids)), params, f"sealign-{uuid4()}")
        (last,) = [answer async for answer in answers if answer.finished]
        (output,) = last.outputs
        return CanaryAnswer(
            tuple(step[token].logprob for step, token in zip(last.prompt_logprobs[1:], ids[1:], strict=True)),
            tuple(output.token_ids),
            tuple(step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)),
        )


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
