"""What an edit of every layer costs at inference, beside the bare model, dense projections and merged weights.

    python benchmarks/applying.py [--rounds 7] [--dtypes float32 bfloat16] [--batches 1 16] [--json FILE]

Prefill is one pass over 512 tokens (``--prefill``), decoding one token after 64 in the cache (``--context``). The edit
is the paper's for truthfulness, fitted on the bundled demonstrations, of every layer. Compiled is torch.compile
with its default backend, the bare model compiled too. Ratios are formed within a round.
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
    return sealign.fit_edit(model, tokenizer, demonstrations, config=sealign.FitConfig(layers="all", **settings))


@contextmanager
def dense(model: Any, edit: sealign.Edit) -> Iterator[None]:
    """Edit by dense projections, as the paper's formulas have it."""
    handles = []
    for layer, path in zip(edit.layers, edit.modules, strict=True):
        projection = edit.projections[layer]
        keep = (projection.positive @ projection.positive.T).to(model.dtype)
        drop = (torch.eye(projection.width) - projection.negative @ projection.negative.T).to(model.dtype)

        def hook(_module: Any, _inputs: Any, output: Any, keep: Any = keep, drop: Any = drop) -> Any:
            return dense_edit(output, keep, drop)

        handles.append(model.get_submodule(path).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def steps(model: Any, batch: int, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Return one prefill and one decoding step as calls."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    tokens = torch.randint(0, vocabulary, (batch, options.prefill), generator=generator)
    one = tokens[:, :1]
    cache = model(tokens[:, : options.context], use_cache=True, logits_to_keep=1).past_key_values

    @torch.no_grad()
    def prefill() -> object:
        return model(tokens, use_cache=False, logits_to_keep=1)

    @torch.no_grad()
    def decode() -> None:
        model(one, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return {"prefill": prefill, "decode": decode}


def arms_of(bare: Any, edit: sealign.Edit, merged: Any, compiled: bool, stack: ExitStack) -> dict[str, Any]:
    """Return models by arm, edited until the stack is closed."""
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
    parser.add_argument("--calls", type=int, default=3, help="of a prefill in a round; ten times as many of a decode")
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
    ranks = [projection.rank_positive + projection.rank_negative for projection in edits["SEA"].projections.values()]
    title = f"Applying an edit of all {len(ranks)} layers of SmolLM2, ranks {min(ranks)} to {max(ranks)}"
    report(f"{title}; {options.rounds} rounds", rows, {"runs": record, "ranks": ranks}, options.json, "transformers")


def _ms(seconds: list[float]) -> list[float]:
    return [1000 * taken for taken in seconds]


def measure(models: Mapping[str, Any], batch: int, options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Time each step of every arm in turns."""
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
