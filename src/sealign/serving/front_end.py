"""In the server's front end: every request is checked, counted, and given its own part of the prefix cache."""

from __future__ import annotations

import copy
from functools import wraps
from typing import Any

from sealign.errors import ServingError, UnknownEditError
from sealign.serving.served_edits import held, registry
from sealign.serving.settings import REQUEST_KEY
from sealign.serving.worker import edit_of

_SALT = "sealign "
"""How the cache salts begin that we give."""


def patch_engine() -> None:
    """Let vLLM's engine client look at the edit of each request, once a process."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    if not hasattr(AsyncLLM.generate, "_sealign"):
        AsyncLLM.generate = _checked(AsyncLLM.generate)
        InputProcessor.process_inputs = _salted(InputProcessor.process_inputs)


def _checked(generate: Any) -> Any:
    """The engine's ``generate``, refusing before it begins.

    vLLM's is an asynchronous generator, which does nothing until the first answer is asked for, when a streaming
    response has already begun with status 200. This one is a plain function, so that what it raises becomes a 4xx.
    """
    from vllm.exceptions import VLLMNotFoundError, VLLMValidationError

    @wraps(generate)
    def call(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        adapter = kwargs.get("lora_request")
        try:
            edit = registry.resolve(sampling_params.extra_args, getattr(adapter, "lora_name", None))
        except UnknownEditError as error:
            raise VLLMNotFoundError(str(error)) from error
        except ServingError as error:
            raise VLLMValidationError(str(error)) from error
        if edit is None:
            return generate(self, prompt, sampling_params, *args, **kwargs)
        params = copy.copy(sampling_params)
        rest = {key: value for key, value in (params.extra_args or {}).items() if key != REQUEST_KEY}
        if edit.route == "lora":
            kwargs["lora_request"] = edit.adapter
        else:
            # From here on the hash stands for the edit, so that a name that is loaded anew cannot be mistaken.
            rest[REQUEST_KEY] = edit.hash
        params.extra_args = rest or None
        return held(edit, generate(self, prompt, params, *args, **kwargs))

    call._sealign = True  # type: ignore[attr-defined]
    return call


def _salted(process_inputs: Any) -> Any:
    """The step that makes a request for the engine, with the edit's hash in the key of its cached blocks.

    Not reading the cache would not do: the edited blocks would still be stored, and the next plain request with the
    same prompt would read them.
    """
    from vllm.exceptions import VLLMValidationError

    @wraps(process_inputs)
    def call(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        edit_hash = edit_of(params)
        if edit_hash is not None and not registry.holds(edit_hash):
            raise VLLMValidationError(f"no edit {str(edit_hash)[:100]!r} is loaded", parameter=REQUEST_KEY)
        request = process_inputs(self, request_id, prompt, params, *args, **kwargs)
        if (request.cache_salt or "").startswith(_SALT):
            # It would let a client store blocks where the requests of an edit look for theirs.
            raise VLLMValidationError(f"cache_salt must not begin with '{_SALT}'", parameter="cache_salt")
        if edit_hash is not None:
            request.cache_salt = f"{_SALT}{edit_hash} {request.cache_salt or ''}"
        return request

    return call
