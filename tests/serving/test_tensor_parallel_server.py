"""``sealign serve`` with a model that is split over two workers, against the hooks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sealign
from sealign import SEAConfig
from sealign.export.verify import PROMPTS, Outputs, compare_outputs, model_outputs
from sealign.fitting.edit_config import EditConfig
from sealign.serving.client import server_outputs
from tests.edit_server import EditServer, fit_and_save

pytestmark = [
    pytest.mark.engines,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("workers"),
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores"),
]

EDITS: dict[str, EditConfig] = {
    "rescaled": SEAConfig(layers="all", rank=(5, 3), centered=True, strength=0.5),
    "tanh": SEAConfig(layers=(0, 3), site="attention", feature_map="tanh", rank=(2, 6), strength=0.5),
    "stream": SEAConfig(layers=(1, 2), site="residual", rank=(2, 6), combine="negative"),
    "later": SEAConfig(layers=(2,), rank=(4, 1), combine="positive", strength=0.3),
    "linear": SEAConfig(layers=(1, 3), rank=(3, 2), normalization="none"),
}
STARTED = [name for name in EDITS if name != "later"]


@pytest.fixture(scope="module")
def model(smollm2: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """Four heads, which two workers can share, and the tokenizer of the embedded model, which has nine."""
    folder, tokenizer = tmp_path_factory.mktemp("parallel"), smollm2[1]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return *sealign.load_model(str(folder / "model"), dtype="float32"), folder


@pytest.fixture(scope="module")
def edits(model: tuple[Any, Any, Path]) -> dict[str, sealign.Edit]:
    loaded, tokenizer, folder = model
    return fit_and_save(loaded, tokenizer, EDITS, folder / "edits")


@pytest.fixture(scope="module")
def references(model: tuple[Any, Any, Path], edits: dict[str, sealign.Edit]) -> tuple[Outputs, dict[str, Outputs]]:
    """What the hooks make of the prompts: without an edit, and with each."""
    loaded, tokenizer, _ = model
    edited = {}
    for name, edit in edits.items():
        with sealign.apply_edit(loaded, edit):
            edited[name] = model_outputs(loaded, tokenizer)
    return model_outputs(loaded, tokenizer), edited


@pytest.fixture(scope="module", params=[(), ("--no-lora",)], ids=["with LoRAs, eager", "without, compiled"])
def server(
    request: pytest.FixtureRequest,
    model: tuple[Any, Any, Path],
    edits: dict[str, sealign.Edit],  # noqa: ARG001  saves the edits
) -> Iterator[EditServer]:
    """A server with LoRAs, which is eager, and then one without, which is compiled; memory may not hold both."""
    folder = model[2]
    named = [argument for edit in STARTED for argument in ("--edit", f"{edit}={folder / 'edits' / edit}")]
    arguments = ["--model", str(folder / "model"), *named, "--edits-dir", str(folder / "edits")]
    arguments += ["--tensor-parallel-size", "2", *request.param]
    with EditServer(folder, *arguments, name=f"server{''.join(request.param)}") as started:
        yield started


def test_two_workers_answer_as_the_hooks(
    model: tuple[Any, Any, Path],
    references: tuple[Outputs, dict[str, Outputs]],
    server: EditServer,
) -> None:
    _, tokenizer, folder = model
    base, edited = references
    name_of_model = str(folder / "model")
    assert "tensor_parallel_size=2" in server.log.read_text()
    assert server.admin("POST", name="later").status_code == 200
    with ThreadPoolExecutor(len(EDITS)) as pool:
        outputs = pool.map(lambda name: server_outputs(server.url, name, tokenizer), EDITS)
        found = dict(zip(EDITS, outputs, strict=True))
    for name in EDITS:
        agreement = compare_outputs(name, base, edited[name], found[name], tolerance=1e-3)
        assert agreement.passed, agreement
    asked = [(name, number) for number in range(len(PROMPTS)) for name in EDITS]

    def ask(pair: tuple[str, int]) -> list[int]:
        answer = server.complete(tokenizer.encode(PROMPTS[pair[1]]), pair[0], count=16, model=name_of_model)
        return [token for token in answer if token != tokenizer.eos_token_id]

    with ThreadPoolExecutor(len(asked)) as pool:  # all at once, so that batches mix them
        answers = list(pool.map(ask, asked))
    assert answers == [list(found[name].completions[number]) for name, number in asked]
    assert server.admin("DELETE", "/later").status_code == 200
    body = {"model": name_of_model, "prompt": "The sea is", "vllm_xargs": {"sealign_edit": "later"}}
    assert server.post("/v1/completions", **body).status_code == 404
