"""Measure the cost of an edit at inference, against the bare model, dense projections and merged weights.

    python benchmarks/applying.py [--rounds 7] [--dtypes float32 bfloat16] [--batches 1 16] [--json FILE]

Prefill is one pass over 512 tokens (``--prefill``); decoding is one token after 64 tokens in the cache (``--context``).
Every layer is edited, with the paper's settings for truthfulness, fitted on the bundled demonstrations. The compiled
mode uses torch.compile with its default backend, for the bare model too. Ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from reference import edit as dense_edit
from rounds import interleave, ratios, report, spread
from transformers import AutoModelForCausalLM

import sealign
from sealign.export.merged import export_merged
from sealign.models.loading import checkpoint_folder


def fit(**settings: Any) -> sealign.Edit:
    """Fit an edit of every layer of the embedded model."""
    model, tokenizer = sealign.load_model("smollm2", dtype="float32")
    demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=64)
    return sealign.fit_edit(model, tokenizer, demonstrations, config=sealign.SEAConfig(layers="all", **settings))


@contextmanager
def dense(model: Any, edit: sealign.Edit) -> Iterator[None]:
    """Apply an edit by dense projections, as in the paper's formulas."""
    handles = []
    for layer, path in zip(edit.layers, edit.modules, strict=True):
        directions = edit.affine_edits[layer].right  # those that are kept, then those that are dropped
        rank = edit.affine_edits[layer].groups[0]
        positive, negative = directions[:rank].T, directions[rank:].T
        keep = (positive @ positive.T).to(model.device, model.dtype)
        drop = (torch.eye(edit.width) - negative @ negative.T).to(model.device, model.dtype)

        def hook(_module: Any, _inputs: Any, output: Any, keep: Any = keep, drop: Any = drop) -> Any:
            return dense_edit(output, keep, drop)

        handles.append(model.get_submodule(path).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def steps(model: Any, batch: int, options: Any) -> dict[str, Callable[[], Any]]:
    """Return functions that run one prefill and one decoding step."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    tokens = torch.randint(0, vocabulary, (batch, options.prefill), generator=generator).to(model.device)
    one = tokens[:, :1]
    plain = getattr(model, "_orig_mod", model)  # so that no graph is compiled for the context
    cache = plain(tokens[:, : options.context], use_cache=True, logits_to_keep=1).past_key_values

    # The strides of the cache change with the first step that is taken back, and would cost a graph of their own.
    plain(one, past_key_values=cache, use_cache=True)
    cache.crop(-1)

    @torch.no_grad()
    def prefill() -> Any:
        return model(tokens, use_cache=False, logits_to_keep=1)

    @torch.no_grad()
    def decode() -> None:
        model(one, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return {"prefill": prefill, "decode": decode}


def arms_of(bare: Any, edit: sealign.Edit, merged: Any, compiled: bool, stack: ExitStack) -> dict[str, Any]:
    """Return the model of each arm, edited until the stack is closed."""
    models = {"bare": bare, "Sealign": copy.deepcopy(bare), "merged": merged}
    stack.enter_context(sealign.apply_edit(models["Sealign"], edit))
    if compiled:
        return {name: torch.compile(model) for name, model in models.items()}
    models["dense"] = copy.deepcopy(bare)
    stack.enter_context(dense(models["dense"], edit))
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--calls", type=int, default=3, help="number of prefills per round; ten times as many decoding steps"
    )
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    edits = {"SEA": fit(), "SEA, unscaled": fit(normalization="none", explained_variance=0.9)}
    with tempfile.TemporaryDirectory() as folder:
        export_merged(checkpoint_folder(), edits["SEA, unscaled"], Path(folder) / "merged")
        rows, record = [], []
        for dtype in options.dtypes:
            base, _ = sealign.load_model("smollm2", dtype=dtype)
            merged = AutoModelForCausalLM.from_pretrained(Path(folder) / "merged", dtype=getattr(torch, dtype)).eval()
            for mode in options.modes:
                with ExitStack() as stack:
                    models = arms_of(base, edits["SEA"], merged, mode == "compiled", stack)
                    for batch in options.batches:
                        for step, seconds in measure(models, batch, options).items():
                            found = {"dtype": dtype, "mode": mode, "batch": batch, "step": step, "seconds": seconds}
                            record.append(found)
                            row = {
                                "": f"{dtype}, {mode}, batch {batch}, {step}",
                                "bare, ms": spread(_ms(seconds["bare"]), 1),
                            }
                            for arm in ("Sealign", "dense", "merged"):
                                row[f"{arm}, of bare"] = spread(ratios(seconds, arm, "bare")) if arm in seconds else ""
                            rows.append(row)
    ranks = [layer_edit.rank for layer_edit in edits["SEA"].layer_edits.values()]
    title = f"Applying an edit of all {len(ranks)} layers of SmolLM2, ranks {min(ranks)} to {max(ranks)}"
    report(f"{title}; {options.rounds} rounds", rows, {"runs": record, "ranks": ranks}, options.json, "transformers")


def _ms(seconds: list[float]) -> list[float]:
    return [1000 * taken for taken in seconds]


def measure(models: Mapping[str, Any], batch: int, options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Time each step of every arm in turn."""
    calls = {name: steps(model, batch, options) for name, model in models.items()}
    return {
        step: interleave(
            {name: by_step[step] for name, by_step in calls.items()},
            options.rounds,
            calls=options.calls * (10 if step == "decode" else 1),
        )
        for step in ("prefill", "decode")
    }


if __name__ == "__main__":
    main()
