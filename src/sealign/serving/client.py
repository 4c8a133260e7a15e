"""A client that asks a server for the log-probabilities and completions that ``sealign verify`` compares."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    """Return the log-probabilities of prompts and their greedy completions by an edit on a vLLM server.

    A name among the server's models is sent as ``model``; any other name is sent in ``vllm_xargs``, which a server
    started by ``sealign serve`` reads, and rejects if it does not know the name.

    Args:
        url: URL of the server, with or without ``/v1``.
        name: Name of the edit on the server.
        tokenizer: Tokenizer of the model; prompts are sent as token ids.
        prompts: Texts of at least 2 tokens each.
        max_new_tokens: Largest length of the completions, in tokens.
        api_key: API key of the server. Default: the variable ``OPENAI_API_KEY``.

    Raises:
        ExportError: The server cannot be reached, or rejects the request.
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


def _prompt_log_probabilities(entries: Sequence[Any], ids: Sequence[int]) -> NDArray[np.float64]:
    """Return the log-probability of each token of a prompt from the second on."""
    pairs = zip(entries[1:], ids[1:], strict=True)
    return np.array([entry[str(token)]["logprob"] for entry, token in pairs], dtype=np.float64)
