"""Measure the collection of activations against bare forward passes and against one sequence at a time.

    python benchmarks/collection.py --data-dir DATA [--demonstrations 500] [--alone 50] [--rounds 3] [--json FILE]

DATA is a folder with HaluEval in the Hub's schema. One sequence at a time is timed on the first ``--alone``
demonstrations and scaled to all of them. Memory is the peak of a separate process above the loaded model, Linux only.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from reference import collect
from rounds import interleave, peak, ratios, report, reset_peak, spread

import sealign
from sealign.demonstrations.demonstration import Demonstration
from sealign.fitting.collect_config import CollectConfig
from sealign.fitting.collecting import collect_activations
from sealign.fitting.sequences import plan_sequences
from sealign.models.batching import pad_right, pad_token
from sealign.models.shared_prefix import Prefix, common_prefix
from sealign.models.sites import resolve_sites
from sealign.models.structure import decoder_of, input_device

CONFIG = CollectConfig()


@torch.no_grad()
def bare(model: Any, tokenizer: Any, demonstrations: Sequence[Demonstration]) -> None:
    """Run the batches of a collection without reading activations."""
    sequences = plan_sequences(tokenizer, demonstrations, CONFIG, None)
    order = sorted(sequences, key=lambda sequence: len(sequence.ids), reverse=True)
    runner, device = decoder_of(model), input_device(model)
    prefix = Prefix.run(runner, common_prefix([sequence.ids for sequence in sequences]), device)
    for start in range(0, len(order), CONFIG.batch_size):
        batch = [sequence.ids[len(prefix.ids) :] for sequence in order[start : start + CONFIG.batch_size]]
        prefix.continue_batch(runner, *pad_right(batch, pad_token(tokenizer, model), device))


def three_sequences(tokenizer: Any, demonstrations: Sequence[Demonstration]) -> list[list[list[int]]]:
    """Return the tokens of each demonstration's prompt, and of the prompt with either completion."""
    style = CONFIG.prompt_format.resolve(tokenizer)
    return [
        [
            style.encode_prompt(tokenizer, item.prompt),
            style.encode(tokenizer, item.prompt, item.positive),
            style.encode(tokenizer, item.prompt, item.negative),
        ]
        for item in demonstrations
    ]


def memory(data_dir: Path, count: int) -> int:
    """Return the peak memory of a collection in a separate process, above the loaded model, in bytes."""
    command = [sys.executable, __file__, "--data-dir", str(data_dir), "--demonstrations", str(count), "--peak"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--demonstrations", type=int, default=500)
    parser.add_argument("--alone", type=int, default=50, help="number of demonstrations to run one sequence at a time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    demonstrations = sealign.load_demonstrations("halueval_qa", data_dir=options.data_dir, limit=options.demonstrations)
    model, tokenizer = sealign.load_model("smollm2", dtype="float32")
    if options.peak:
        collect_activations(model, tokenizer, demonstrations[:2], config=CONFIG)
        before = reset_peak()
        collect_activations(model, tokenizer, demonstrations, config=CONFIG)
        print(peak() - before)
        return
    modules = [site.path for site in resolve_sites(model, "mlp", None)]
    few = three_sequences(tokenizer, demonstrations[: options.alone])
    arms = {
        "Sealign": lambda: collect_activations(model, tokenizer, demonstrations, config=CONFIG),
        "bare forward passes": lambda: bare(model, tokenizer, demonstrations),
        "one at a time": lambda: collect(model, few, modules),
    }
    seconds: dict[str, list[float]] = interleave(arms, options.rounds)
    share = len(demonstrations) / len(few)
    seconds["one at a time"] = [share * taken for taken in seconds["one at a time"]]
    throughput = ratios(seconds, "bare forward passes", "Sealign")
    faster = ratios(seconds, "one at a time", "Sealign")
    counts = sorted({max(2, options.demonstrations // part) for part in (4, 2, 1)})
    peaks = {count: memory(options.data_dir, count) for count in counts}
    rows = [
        {"": "Sealign, s", "median (range)": spread(seconds["Sealign"], 1)},
        {"": "bare forward passes on the same batches, s", "median (range)": spread(seconds["bare forward passes"], 1)},
        {"": f"one at a time, s (from {len(few)})", "median (range)": spread(seconds["one at a time"], 1)},
        {"": "token throughput, of the bare forward passes", "median (range)": spread(throughput)},
        {"": "times faster than one at a time", "median (range)": spread(faster, 1)},
        *(
            {"": f"peak above the model, {count} demonstrations, MB", "median (range)": f"{peaks[count] / 1e6:.0f}"}
            for count in counts
        ),
    ]
    record = {"seconds": seconds, "throughput": throughput, "times_faster": faster, "peaks": peaks}
    title = f"Collection of {len(demonstrations)} demonstrations, SmolLM2, all layers, float32, {options.rounds} rounds"
    report(title, rows, record, options.json, "transformers")
    print(f"throughput, median: {statistics.median(throughput):.3f}")


if __name__ == "__main__":
    main()
