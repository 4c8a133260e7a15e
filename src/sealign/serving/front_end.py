"""Patches of vLLM's front end: each request is checked and counted, and has the prefix cache of its own edit."""

from __future__ import annotations

import copy
from typing import Any

from sealign.errors import ServingError, UnknownEditError
from sealign.serving.patching import wrap
from sealign.serving.request_counters import request_counters
from sealign.serving.served_edits import SERVED, count_request
from sealign.serving.settings import PLUGIN_PATH, REQUEST_KEY
from sealign.serving.worker import edit_hash_of

_SALT = "sealign "
"""Prefix of the cache salts that this module sets."""


def patch_engine() -> None:
    """Patch vLLM's engine client so that it reads the edit of each request; a second call does nothing."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    wrap(AsyncLLM, "generate", _with_check, parameters=("prompt", "sampling_params"), keywords=("lora_request",))
    wrap(InputProcessor, "process_inputs", _with_salt, parameters=("request_id", "prompt", "params"))


def _with_check(generate: Any) -> Any:
    """Return the engine's ``generate`` with a check of the request's edit before it starts.

    vLLM's is an asynchronous generator, which does nothing before its first answer is awaited, when a streaming
    response has already begun with status 200. The returned function is a plain one, so that its errors become 4xx.
    """
    from vllm.exceptions import VLLMNotFoundError, VLLMValidationError

    def call(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            edit = SERVED.resolve(sampling_params.extra_args, kwargs.get("lora_request"))
        except UnknownEditError as error:
            raise VLLMNotFoundError(str(error)) from error
        except ServingError as error:
            raise VLLMValidationError(str(error)) from error
        if edit is None:
            return generate(self, prompt, sampling_params, *args, **kwargs)
        params = copy.copy(sampling_params)
        kwargs["lora_request"] = edit.adapter if edit.route == "lora" else None
        rest = {key: value for key, value in (params.extra_args or {}).items() if key != REQUEST_KEY}
        if edit.route == "plugin":
            # The workers get the hash, since another edit may be loaded under the name before the request ends.
            rest[REQUEST_KEY] = edit.hash
        params.extra_args = rest or None
        answers = generate(self, prompt, params, *args, **kwargs)
        if not SERVED.serves(edit):
            return count_request(edit, answers)
        return count_request(edit, answers, request_counters().request(edit.name, params))

    return call


def _with_salt(process_inputs: Any) -> Any:
    """Return the step that prepares a request for the engine, with the edit's hash in the key of its cached blocks.

    Skipping the cache when a request is read would not be enough: the edited blocks would still be stored, and the
    next request with the same prompt and no edit would read them.
    """
    from vllm.exceptions import VLLMValidationError

    def call(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        edit_hash = edit_hash_of(params)
        if edit_hash is not None and not SERVED.holds(edit_hash):
            raise VLLMValidationError(f"no edit {str(edit_hash)[:100]!r} is loaded", parameter=REQUEST_KEY)
        for value in (*args, *kwargs.values()):
            # Of a route that does not generate, for which the name of an edit of the plug-in is no adapter.
            if str(getattr(value, "lora_path", "")).startswith(PLUGIN_PATH):
                raise VLLMValidationError(f"this route takes no edits; '{value.lora_name}' is one", parameter="model")
        request = process_inputs(self, request_id, prompt, params, *args, **kwargs)
        if (request.cache_salt or "").startswith(_SALT):
            # Otherwise a client could store blocks under the key of an edit's requests.
            raise VLLMValidationError(f"cache_salt must not begin with '{_SALT}'", parameter="cache_salt")
        if edit_hash is not None:
            request.cache_salt = f"{_SALT}{edit_hash} {request.cache_salt or ''}"
        return request

    return call
