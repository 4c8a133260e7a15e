"""What a server makes of prompts, asked over its OpenAI-compatible interface."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from sealign.errors import ExportError
from sealign.export.verify import PROMPTS, Outputs
from sealign.serving.settings import REQUEST_KEY


def server_outputs(
    url: str,
    name: str,
    tokenizer: Any,
    prompts: Sequence[str] = PROMPTS,
    *,
    max_new_tokens: int = 16,
    api_key: str | None = None,
) -> Outputs:
    """Return what an edit on a vLLM server makes of prompts.

    A name that the server lists among its models is asked for as one, which is how LoRAs are served; any other is sent
    as ``vllm_xargs``, which ``sealign serve`` reads and refuses where it does not know the name.

    Args:
        url: of the server, with or without ``/v1``.
        name: of the edit on the server.
        tokenizer: of the model; the server is sent token ids.
        prompts: each of at least 2 tokens.
        max_new_tokens: length of the completions.
        api_key: of the server, if it asks for one; default: the variable ``OPENAI_API_KEY``.

    Raises:
        ExportError: the server cannot be reached, or refuses.
    """
    from openai import OpenAI, OpenAIError

    key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
    client = OpenAI(base_url=url.rstrip("/").removesuffix("/v1") + "/v1", api_key=key, max_retries=1)
    logs, completions = [], []
    try:
        models = [model.id for model in client.models.list()]
        extra: dict[str, Any] = {"prompt_logprobs": 0, "return_token_ids": True}
        if name not in models:
            extra["vllm_xargs"] = {REQUEST_KEY: name}
        for prompt in prompts:
            ids = list(tokenizer.encode(prompt))
            answer: Any = client.completions.create(
                model=name if name in models else models[0],
                prompt=ids,
                max_tokens=max_new_tokens,
                temperature=0,
                extra_body=extra,
            )
            choice = answer.choices[0]
            logs.append(_prompt_log_probabilities(choice.prompt_logprobs, ids))
            completions.append([token for token in choice.token_ids if token != tokenizer.eos_token_id])
    except OpenAIError as error:
        raise ExportError(f"the server at {url} did not answer for the edit '{name}': {error}") from error
    return Outputs(logs, completions)


def _prompt_log_probabilities(entries: Sequence[Any], ids: Sequence[int]) -> Any:
    """The log-probability of each token of the prompt, from the second on."""
    pairs = zip(entries[1:], ids[1:], strict=True)
    return np.array([entry[str(token)]["logprob"] for entry, token in pairs], dtype=np.float64)
