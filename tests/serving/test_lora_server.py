"""LoRAs on a server of vLLM's CPU build: they act, and only on their own requests."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sealign
from sealign.cache import cache_dir
from sealign.export.lora import ADAPTER_TENSORS, export_lora
from sealign.models.loading import checkpoint_folder
from sealign.serving.edit_loader import adapter_key
from tests.edit_server import EditServer, completion_body
from tests.serving.served_model import COUNT, NEAR, ON_SERVER, Answer, assert_same, long_body, streamed

pytestmark = ON_SERVER


@contextlib.contextmanager
def last_place(server: EditServer) -> Iterator[str]:
    """The LoRA in the last of the server's places, in use by a request that runs until the end."""
    assert server.admin("POST", name="later-lora").json()["route"] == "lora"
    running = streamed(server, long_body([1, 2, 3], "model:later-lora") | {"n": 2})
    next(running)
    yield "model:later-lora"
    next(running)  # it did not end
    running.close()  # type: ignore[attr-defined]
    assert server.admin("DELETE", "/later-lora").status_code == 200


@pytest.fixture(scope="module")
def long_prompts(smollm2: Any) -> list[list[int]]:
    text = (Path(sealign.__file__).parent / "demonstrations" / "data" / "neutral.txt").read_text()
    ids = smollm2[1].encode(text)
    return [ids[20 + 500 * number :][: (330, 163, 156, 149)[number]] for number in range(4)]


@torch.no_grad()
def check(model: Any, ids: Sequence[int], answer: Sequence[int], scores: Sequence[float]) -> None:
    """Raise unless an answer is greedy, and the log-probabilities of its tokens, and any before, are the model's."""
    wanted = torch.log_softmax(model(torch.tensor([[*ids, *answer]])).logits[0, :-1].double(), -1)
    given = wanted.gather(1, torch.tensor([[*ids[1:], *answer]]).T)[:, 0]
    np.testing.assert_allclose(scores, given[-len(scores) :], atol=NEAR)
    np.testing.assert_allclose(given[-len(answer) :], wanted.amax(1)[-len(answer) :], atol=NEAR)


def ask(
    server: EditServer, ids: list[int], arm: str | None, *, prompt: bool = False
) -> tuple[int, list[int], list[float]]:
    """The length of the prompt that was cached, the answer, and the log-probabilities, those of the prompt first."""
    more = {"logprobs": 0} | ({"prompt_logprobs": 0} if prompt else {})
    answer = server.post("/v1/completions", **completion_body(ids, arm, 6, **more))
    assert answer.status_code == 200, answer.text
    found = answer.json()
    (choice,) = found["choices"]
    read = choice["prompt_logprobs"][1:] if prompt else []
    scores = [entry[str(token)]["logprob"] for entry, token in zip(read, ids[1:], strict=False)]
    details = found["usage"]["prompt_tokens_details"] or {}
    return details.get("cached_tokens") or 0, choice["token_ids"], scores + choice["logprobs"]["token_logprobs"]


def test_requests_beside_loras_are_their_own_and_so_is_what_is_cached_of_them(
    server: EditServer, smollm2: Any, edits: dict[str, sealign.Edit], long_prompts: list[list[int]]
) -> None:
    """Without the patches the plain ones get the adapter in the last place, and half of these end the engine."""
    model, _ = smollm2
    with last_place(server) as last:
        arms = [None, "model:linear", None, last, last, None, "model:linear", None]
        jobs = [(long_prompts[n % 4], arm, n in (1, 2, 4, 7)) for n, arm in enumerate(arms)]
        with ThreadPoolExecutor(len(jobs)) as pool:
            found = list(pool.map(lambda job: ask(server, job[0], job[1], prompt=job[2]), jobs))
        # The plain request of each prompt stored its blocks beside the others.
        again = [ask(server, ids, None) for ids in long_prompts]
    for (ids, arm, prompt), (_, answer, scores) in zip(jobs, found, strict=True):
        with contextlib.ExitStack() as stack:
            if arm is not None:
                stack.enter_context(sealign.apply_edit(model, edits[arm.removeprefix("model:")]))
            check(model, ids, answer, scores)
        assert len(scores) == len(answer) + (len(ids) - 1 if prompt else 0)
    for ids, (cached, answer, scores) in zip(long_prompts, again, strict=True):
        assert cached == len(ids) // 128 * 128
        check(model, ids, answer, scores)


def test_beam_search_by_the_name_of_a_lora_is_edited(
    server: EditServer, prompts: list[list[int]], expected: dict[str | None, list[Answer]]
) -> None:
    """A single beam is the greedy answer."""
    changed = [n for n in range(len(prompts)) if expected["linear"][n][0] != expected[None][n][0]][:3]
    for number in changed:
        answer = server.complete(
            prompts[number], "model:linear", count=COUNT, use_beam_search=True, n=1, ignore_eos=True
        )
        assert_same(answer, expected["linear"][number])


def test_a_lora_that_does_not_act_everywhere_is_refused(
    server: EditServer, smollm2: Any, edits: dict[str, sealign.Edit]
) -> None:
    """vLLM loads all of these adapters without a word: of layers that the model does not have, and of zeros."""
    edit = edits["later-lora"]
    adapter = cache_dir() / "adapters" / adapter_key(edit, checkpoint_folder("smollm2"))
    shutil.rmtree(adapter, ignore_errors=True)
    export_lora(smollm2[0], edit, adapter)
    tensors = load_file(adapter / ADAPTER_TENSORS)
    wrong = {
        "at 0 of 9 modules": {name.replace(".layers.", ".layers.9"): one for name, one in tensors.items()},
        "at 8 of 9 modules": {name.replace(".layers.25.", ".layers.925."): one for name, one in tensors.items()},
        "changes no output": {name: one * ("lora_A" in name) for name, one in tensors.items()},
    }
    try:
        for says, changed in wrong.items():  # one that is refused leaves nothing that would be in the way
            save_file(changed, adapter / ADAPTER_TENSORS)
            refused = server.admin("POST", name="later-lora")
            assert (refused.status_code, says in refused.json()["error"]["message"]) == (409, True), refused.text
        assert "later-lora" not in [edit["name"] for edit in server.admin("GET").json()]
        assert server.post("/v1/completions", model="later-lora", prompt="The sea is").status_code == 404
    finally:
        shutil.rmtree(adapter)
    assert server.admin("POST", name="later-lora").json()["route"] == "lora"
    assert server.admin("DELETE", "/later-lora").status_code == 200
