"""``sealign serve`` with a model that is split over two workers, against the hooks."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sealign
from sealign import SEAConfig
from sealign.export.verify import PROMPTS, compare_outputs, reference_outputs
from sealign.fitting.edit_config import EditConfig
from sealign.serving.client import server_outputs
from tests.edit_server import EditServer

pytestmark = [
    pytest.mark.engines,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores"),
]

EDITS: dict[str, EditConfig] = {
    "rescaled": SEAConfig(layers="all", rank=(5, 3), centered=True, strength=0.5),
    "tanh": SEAConfig(layers=(0, 3), site="attention", feature_map="tanh", rank=(2, 6), strength=0.5),
    "stream": SEAConfig(layers=(1, 2), site="residual", rank=(2, 6), combine="negative"),
    "later": SEAConfig(layers=(2,), rank=(4, 1), combine="positive", strength=0.3),
    "linear": SEAConfig(layers=(1, 3), rank=(3, 2), normalization="none"),
}


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


@pytest.mark.parametrize("loras", [True, False], ids=["with LoRAs, eager", "without, compiled"])
def test_two_workers_answer_as_the_hooks(
    model: tuple[Any, Any, Path], loras: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, tokenizer, folder = model
    demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=12)
    edits = {}
    for name, config in EDITS.items():
        edits[name] = sealign.fit_edit(loaded, tokenizer, demonstrations, config=config)
        if not (folder / "edits" / name).is_dir():
            edits[name].save_pretrained(folder / "edits" / name)
    started = [name for name in EDITS if name != "later"]
    named = [argument for name in started for argument in ("--edit", f"{name}={folder / 'edits' / name}")]
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    name_of_model = str(folder / "model")
    arguments = ["--model", name_of_model, *named, "--edits-dir", str(folder / "edits")]
    arguments += [] if loras else ["--no-lora"]
    with EditServer(folder, *arguments, "--tensor-parallel-size", "2", name=f"server-{loras}") as server:
        assert "tensor_parallel_size=2" in server.log.read_text()
        assert server.admin("POST", name="later").status_code == 200
        # One after another: vLLM with LoRAs on a CPU ends when it is asked for these beside other requests.
        found = {name: server_outputs(server.url, name, tokenizer) for name in edits}
        for name, edit in edits.items():
            base, edited = reference_outputs(loaded, tokenizer, edit)
            agreement = compare_outputs(name, base, edited, found[name], tolerance=1e-3)
            assert agreement.passed, agreement
        asked = [(name, number) for number in range(len(PROMPTS)) for name in edits]

        def ask(pair: tuple[str, int]) -> list[int]:
            answer = server.complete(tokenizer.encode(PROMPTS[pair[1]]), pair[0], count=16, model=name_of_model)
            return [token for token in answer if token != tokenizer.eos_token_id]

        with ThreadPoolExecutor(len(asked)) as pool:  # all at once, so that batches mix them
            answers = list(pool.map(ask, asked))
        assert answers == [list(found[name].completions[number]) for name, number in asked]
        assert server.admin("DELETE", "/later").status_code == 200
        body = {"model": name_of_model, "prompt": "The sea is", "vllm_xargs": {"sealign_edit": "later"}}
        assert server.post("/v1/completions", **body).status_code == 404
