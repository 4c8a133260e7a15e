"""What the servers of the tests serve, and what the hooks make of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from sealign import LEACEConfig, MeanDifferenceConfig, SEAConfig
from sealign.fitting.edit_config import EditConfig
from tests.edit_server import TOKEN, EditServer, completion_body

ON_SERVER = [pytest.mark.engines, pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("servers")]
"""Marks of tests that use the shared servers, so that one worker runs all of them."""

COUNT = 12
NEAR = 2e-3
"""Two next tokens whose logits are nearer than this may change places between two ways of adding the same numbers."""

QUESTIONS = (
    "The capital of France is",
    "What happens if you swallow chewing gum? I think that",
    "To repair a puncture, first find the hole:",
    "My grandmother always said that",
    "Water boils at",
    "The three largest cities of the country are",
    "def fibonacci(n):",
    "Is it true that bats are blind?",
)
EDITS: dict[str, EditConfig] = {
    "linear": SEAConfig(layers="last:10", rank=(4, 9), normalization="none", combine="negative"),
    "rescaled": SEAConfig(layers="last:8", explained_variance=0.9, centered=True, strength=0.5),
    "tanh": SEAConfig(layers="last:5", site="attention", feature_map="tanh", combine="positive", strength=0.3),
    "stream": SEAConfig(layers="last:6", site="residual", rank=(3, 12), combine="negative", strength=0.3),
    "shift": MeanDifferenceConfig(layers=(10, 14), token="last", strength=2.0),
    "gated": MeanDifferenceConfig(layers=(10, 14), token="last", strength=2.0, gate=0.3),
    "erased": LEACEConfig(site="mlp", layers=(12, 20), strength=3.0),
    "later": SEAConfig(layers=(20, 24), rank=(2, 5), centered=True),
    "later-lora": SEAConfig(layers="last:9", rank=(2, 7), normalization="none", combine="negative"),
}
STARTED = ("linear", "rescaled", "tanh", "stream", "shift", "gated", "erased")

Answer = tuple[list[int], list[float]]
"""Greedy ids, and at each by how much its logit is ahead of the next."""


def answers_by_hooks(model: Any, prompts: Sequence[Sequence[int]], count: int = COUNT) -> list[Answer]:
    """The answers of a model, with what is attached to it, to all prompts in one batch."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=count,
        do_sample=False,
        temperature=None,
        top_p=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(output.logits, 1).topk(2).values
    ahead = (best[..., 0] - best[..., 1]).tolist()
    # After the end of an answer there is padding, which a server does not send.
    ends = model.generation_config.eos_token_id
    found = []
    for sequence, margins in zip(output.sequences[:, longest:].tolist(), ahead, strict=True):
        length = sequence.index(ends) + 1 if ends in sequence else len(sequence)
        found.append((sequence[:length], margins[:length]))
    return found


def assert_same(found: Sequence[int], expected: Answer, *, near: float = NEAR) -> None:
    """The same ids, up to the first that was a close call."""
    ids, ahead = expected
    sure = next((i for i, margin in enumerate(ahead) if margin < near), len(ids))
    assert list(found[:sure]) == ids[:sure]
    assert sure == len(ids) or len(found) >= sure


def start(folder: Path, names: Sequence[str], *more: str, log: str, token: str | None = TOKEN) -> EditServer:
    """Start a server of edits in a folder."""
    named = [argument for edit in names for argument in ("--edit", f"{edit}={folder / 'edits' / edit}")]
    return EditServer(folder, *named, "--enable-prompt-tokens-details", *more, name=log, token=token)


def streamed(server: EditServer, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pieces of a streaming answer; the client leaves when the generator is closed."""
    with requests.post(
        f"{server.url}/v1/completions", json=body | {"stream": True}, stream=True, timeout=120
    ) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                yield json.loads(line.removeprefix(b"data: "))


def long_body(prompt: list[int], edit: str) -> dict[str, Any]:
    """A request for 16,000 tokens, so that what a test does meanwhile is in its middle."""
    return completion_body(prompt, edit, 1000) | {"ignore_eos": True, "n": 16, "temperature": 1.0}


def cached_tokens(server: EditServer, ids: list[int], edit: str | None, **more: Any) -> tuple[int, list[int]]:
    """How many tokens of a prompt the server had in its cache, and its answer."""
    answer = server.post("/v1/completions", **completion_body(ids, edit, 8, **more)).json()
    details = answer["usage"]["prompt_tokens_details"] or {}
    return details.get("cached_tokens") or 0, answer["choices"][0]["token_ids"]
