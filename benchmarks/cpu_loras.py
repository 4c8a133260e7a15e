"""Measure what plain requests get from vLLM on a CPU when their batch also holds requests for LoRAs.

    .venv-vllm/bin/python benchmarks/cpu_loras.py [--prompt-tokens 330] [--new-tokens 16] [--json FILE]

Stock vLLM, then vLLM as ``sealign serve`` patches it, gets four plain requests in one batch with four requests for two
LoRAs, which fill all places, and then the plain requests again, which read the prefix blocks that the first ones
stored. The log-probabilities of all generated tokens are compared with those of the model in transformers. Needs
``make engines-env``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import sealign
from sealign import SEAConfig
from sealign.export.lora import export_lora
from sealign.models.loading import checkpoint_folder
from sealign.serving.settings import PLUGIN

EDITS = {
    "first": SEAConfig(layers="last:10", rank=(4, 9), normalization="none", combine="negative"),
    "last": SEAConfig(layers="last:9", rank=(2, 7), normalization="none", combine="negative"),
}
ARMS = {"stock vLLM": "none", "sealign serve": PLUGIN}
"""Value of ``VLLM_PLUGINS`` by arm."""


def ask(folder: Path, prompts: list[list[int]], new_tokens: int) -> dict[str, list[Any]]:
    """Return ids and log-probabilities of what vLLM answers to plain requests, in the batch and afterwards."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import tokens_input
    from vllm.lora.request import LoRARequest

    places = {"max_loras": len(EDITS), "max_lora_rank": 16, "enable_lora": True}
    engine = LLM(str(checkpoint_folder("smollm2")), dtype="float32", max_model_len=1024, **places)
    loras = [LoRARequest(name, number, str(folder / name)) for number, name in enumerate(EDITS, start=1)]
    inputs = [tokens_input(ids) for ids in prompts]
    params = SamplingParams(max_tokens=new_tokens, temperature=0, logprobs=0, ignore_eos=True)
    adapters = [None] * len(inputs) + [loras[number % 2] for number in range(len(inputs))]
    found: dict[str, list[Any]] = {}
    for name, asked in (("in the batch", adapters), ("read from the cache", [None] * len(inputs))):
        answers = engine.generate([inputs[n % len(inputs)] for n in range(len(asked))], params, lora_request=asked)
        plain = [answer.outputs[0] for answer in answers[: len(inputs)]]
        found[name] = [
            (list(one.token_ids), [at[token].logprob for at, token in zip(one.logprobs, one.token_ids, strict=True)])
            for one in plain
        ]
    return found


@torch.no_grad()
def compare(model: Any, prompts: list[list[int]], answers: list[Any]) -> dict[str, float]:
    """Return how far log-probabilities are from the model's, and the fraction of tokens that are its most probable."""
    away, greedy = [], []
    for prompt, (ids, scores) in zip(prompts, answers, strict=True):
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        wanted = torch.log_softmax(logits.double(), -1)
        away += np.abs(wanted[range(len(ids)), ids].numpy() - scores).tolist()
        greedy += (wanted.argmax(1) == torch.tensor(ids)).tolist()
    return {"largest": max(away), "mean": float(np.mean(away)), "greedy": float(np.mean(greedy))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=330)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ask", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        prompts = json.loads((options.ask / "prompts.json").read_text())
        (options.ask / "answers.json").write_text(json.dumps(ask(options.ask, prompts, options.new_tokens)))
        return
    model, tokenizer = sealign.load_model("smollm2", dtype="float32")
    text = (Path(sealign.__file__).parent / "demonstrations" / "data" / "neutral.txt").read_text()
    ids = tokenizer.encode(text)
    prompts = [ids[20 + 500 * number :][: options.prompt_tokens - 7 * number] for number in range(4)]
    demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=16)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "prompts.json").write_text(json.dumps(prompts))
        for name, config in EDITS.items():
            export_lora(model, sealign.fit_edit(model, tokenizer, demonstrations, config=config), folder / name)
        for arm, plugins in ARMS.items():
            settings = {"VLLM_PLUGINS": plugins, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
            settings |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
            command = [sys.executable, __file__, "--ask", str(folder), "--new-tokens", str(options.new_tokens)]
            subprocess.run(command, env=os.environ | settings, check=True, stdout=sys.stderr)
            answers = json.loads((folder / "answers.json").read_text())
            results[arm] = {name: compare(model, prompts, found) for name, found in answers.items()}
    table = Table("plain requests", "", "largest", "mean difference, nats", "greedy tokens", box=None)
    for arm, rows in results.items():
        for name, row in rows.items():
            table.add_row(arm, name, f"{row['largest']:.5f}", f"{row['mean']:.5f}", f"{row['greedy']:.2f}")
    Console(width=100).print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
