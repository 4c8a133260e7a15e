"""Measure the time and memory of a fit against its plan.

    python benchmarks/plan.py [--rounds 3] [--demonstrations 143] [--json FILE]

The models are the embedded one and two with random weights: one four times as wide, and a mixture of experts. All
layers are fitted. Ratios are measured over planned; a plan should be within a factor of two. Memory is the peak of the
process above its memory before the model is built, on Linux only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rounds import peak, report, reset_peak, spread
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

import sealign
from sealign.fitting.collected import Collected
from sealign.fitting.plan import plan_fit
from sealign.methods.sea import decompose
from sealign.models.loading import load_model

SHAPES = {"num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 49152}


def random_model(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def models() -> dict[str, Callable[[], Any]]:
    """Return functions that build the models, by name."""
    wide = LlamaConfig(hidden_size=2304, intermediate_size=6144, num_hidden_layers=4, **SHAPES)
    experts = MixtralConfig(
        hidden_size=1024, intermediate_size=1536, num_hidden_layers=6, num_local_experts=8, **SHAPES
    )
    return {
        "embedded, 30 layers of 576": lambda: load_model()[0],
        "random, 4 layers of 2304": lambda: random_model(wide),
        "8 experts, 2 used, 6 layers of 1024": lambda: random_model(experts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--demonstrations", type=int, default=143)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    _, tokenizer = load_model()
    learnt = sealign.load_demonstrations("bundled:truthfulness", limit=options.demonstrations)
    config = sealign.SEAConfig(layers="all")
    rows, record = [], {}
    for name, make in models().items():
        before = reset_peak()
        model = make()
        ratios: dict[str, list[float]] = {"collection": [], "decomposition": [], "memory": []}
        for _ in range(options.rounds):
            plan = plan_fit(model, tokenizer, learnt, config)
            reset_peak()
            started = time.perf_counter()
            found = sealign.collect_activations(model, tokenizer, learnt, config=config.collect_config())
            collected = time.perf_counter()
            activations = Collected(found, config)
            for layer in activations.layers:
                decompose(activations.statistics(layer), config)
            finished = time.perf_counter()
            ratios["collection"].append((collected - started) / plan.collection_seconds)
            ratios["decomposition"].append((finished - collected) / plan.decomposition_seconds)
            ratios["memory"].append((peak() - before) / plan.peak_bytes)
        record[name] = ratios | {"planned": {"collection": plan.collection_seconds, "peak": plan.peak_bytes}}
        rows.append(
            {
                "model": name,
                "planned, s": f"{plan.collection_seconds:.1f} + {plan.decomposition_seconds:.2f}",
                **{f"{what}, measured / planned": spread(found, 2) for what, found in ratios.items()},
            }
        )
        del model, found, activations
    report(f"Fits against their plans, medians of {options.rounds} rounds", rows, record, options.json)
    worst = max(
        max(value, 1 / value)
        for ratios in record.values()
        for what in ("collection", "decomposition", "memory")
        for value in [statistics.median(ratios[what])]
    )
    print(f"furthest from its plan: a factor of {worst:.2f}")


if __name__ == "__main__":
    main()
