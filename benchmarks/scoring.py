"""Time the scoring of Sealign and of lm-evaluation-harness's own Hugging Face model, alternately on the same items.

    python benchmarks/scoring.py --data-dir DATA [--items 40] [--rounds 3] [--json FILE]

The harness's model runs at the fastest of the given batch sizes, which is determined on a part of the items first.
Both run whole tasks through ``lm_eval.simple_evaluate``, so that building prompts and computing metrics counts for
both. TruthfulQA stands for its two multiple-choice tasks together. DATA has the tasks in the schemas of the Hub.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from rich.table import Table

import sealign
from sealign.evaluation.harness import SealignLM
from sealign.evaluation.local_tasks import task_manager

TASKS = {"TruthfulQA MC1 and MC2": ["truthfulqa_mc1", "truthfulqa_mc2"], "BBQ": ["bbq"]}


def run(lm: Any, tasks: Sequence[str], data_dir: Path, items: int) -> tuple[float, dict[tuple[str, int, int], float]]:
    """Return the duration of an evaluation in seconds, and the log-likelihood of each choice."""
    found = {}
    with task_manager(tasks, data_dir) as manager:
        started = time.perf_counter()
        for task in tasks:
            result = simple_evaluate(model=lm, tasks=[task], limit=items, bootstrap_iters=0, task_manager=manager)
            for sample in result["samples"][task]:
                for choice, response in enumerate(sample["resps"]):
                    found[task, sample["doc_id"], choice] = float(response[0][0])
        return time.perf_counter() - started, found


def measure(name: str, options: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Time both models alternately on one set of tasks."""
    tasks, data_dir = TASKS[name], options.data_dir
    probe = max(4, options.items // 5)
    run(SealignLM(model, tokenizer=tokenizer), tasks, data_dir, 2)  # loads the data once
    sizes = {
        size: run(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size), tasks, data_dir, probe)[0]
        for size in options.batch_sizes
    }
    best = min(sizes, key=lambda size: sizes[size])
    harness_seconds, sealign_seconds, worst = [], [], 0.0
    for _ in range(options.rounds):
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=best)
        seconds, theirs = run(harness, tasks, data_dir, options.items)
        harness_seconds.append(seconds)
        seconds, ours = run(SealignLM(model, tokenizer=tokenizer), tasks, data_dir, options.items)
        sealign_seconds.append(seconds)
        assert theirs.keys() == ours.keys()
        worst = max(worst, *(abs(theirs[key] - ours[key]) for key in theirs))
    ratios = [theirs / ours for theirs, ours in zip(harness_seconds, sealign_seconds, strict=True)]
    return {
        "tasks": tasks,
        "choices": len(theirs),
        "batch_size": best,
        "probe_seconds": sizes,
        "harness_seconds": harness_seconds,
        "sealign_seconds": sealign_seconds,
        "ratios": ratios,
        "largest_difference": worst,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--items", type=int, default=40, help="number of items of each task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model, tokenizer = sealign.load_model(options.model, dtype="float32")
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in ("sealign", "torch", "transformers", "lm_eval")},
    }
    results = {name: measure(name, options, model, tokenizer) for name in TASKS}
    counts = f"{options.items} items per task, {options.rounds} rounds, {machine['threads']} threads"
    title = f"{options.model}, {counts}, float32"
    table = Table(title=title)
    for column in ("task", "choices", "harness, s (batch)", "Sealign, s", "times faster", "largest difference"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name, found in results.items():
        median = {key: statistics.median(found[key]) for key in ("harness_seconds", "sealign_seconds", "ratios")}
        spread = f"{median['ratios']:.1f} ({min(found['ratios']):.1f} to {max(found['ratios']):.1f})"
        table.add_row(
            name,
            str(found["choices"]),
            f"{median['harness_seconds']:.1f} ({found['batch_size']})",
            f"{median['sealign_seconds']:.1f}",
            spread,
            f"{found['largest_difference']:.1e}",
        )
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
