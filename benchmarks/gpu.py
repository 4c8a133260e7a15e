"""Measure fitting, applying and merging on one large GPU: a model of Llama-2-7B's shape with random weights.

    python benchmarks/gpu.py --output FILE [--time-limit 480] [--rounds 5] [--small]

Needs a GPU with 40 GB of memory, and neither a network nor files of a model: the weights are drawn on the device in
bfloat16, and the tokenizer knows the words of the demonstrations. Ratios are taken within a round of interleaved runs.
The file is written after each measurement; once the time limit would be passed, the remaining ones are named as
skipped. ``--small`` measures a tiny model, on the CPU if there is no GPU, where it compiles with the backend ``eager``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from applying import dense, steps
from collection import CONFIG, bare
from random_model import demonstrations_of, random_llama, tokenizer_of, twin
from rounds import interleave, machine, peak, ratios, reset_peak, spread
from torch import Tensor, nn
from transformers import CompileConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import sealign
from sealign.edits.operator import edit_tokens
from sealign.export.matrix_changes import matrix_changes
from sealign.fitting.layer_statistics import LayerStatistics
from sealign.methods.sea import decompose


@dataclass(frozen=True)
class Size:
    """Sizes of what is measured; the defaults are those of a large GPU."""

    model: Mapping[str, float] | None = None
    checked: Mapping[str, float] | None = None
    demonstrations: int = 500
    rank: int = 15
    prefill: int = 512
    context: int = 64
    new_tokens: int = 65
    batches: tuple[int, ...] = (1, 16)
    compiled_layers: int = 8
    calls: int = 3
    tokens: tuple[int, ...] = (1, 16, 512, 8192)


CHECKED = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8}
TINY: dict[str, float] = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"initializer_range": 0.2}
SMALL = Size(TINY, TINY, 12, 3, 9, 5, 4, (2,), 1, 1, (3,))

REPEATS = 20
"""Number of times that an operator runs between two synchronizations."""


class Measurements:
    """Results by name, written after each measurement, and the time that is left.

    Args:
        file: JSON file to write.
        limit: Time limit in seconds from now.
        **context: Machine and settings, written along.
    """

    def __init__(self, file: Path, limit: float, **context: Any) -> None:
        self._file, self._limit, self._started = file, limit, time.perf_counter()
        self._record: dict[str, Any] = {**context, "measurements": {}, "skipped": {}, "failed": {}}

    @property
    def complete(self) -> bool:
        """Whether nothing failed; what was skipped does not count."""
        return not self._record["failed"]

    def take(self, name: str, measurement: Callable[[], Mapping[str, Any]], *, expected: float = 0) -> None:
        """Run a measurement and write its result, unless its expected seconds would pass the time limit."""
        before = self._elapsed()
        if before + expected > self._limit:
            self._record["skipped"][name] = f"{expected:.0f} s expected, {max(0, self._limit - before):.0f} s left"
            self._say(f"skipped: {name}")
        else:
            self._say(name)
            try:
                found = dict(measurement())
            except Exception as error:  # the measurements after it are still worth their time
                self._record["failed"][name] = f"{type(error).__name__}: {error}"
                self._say(f"  failed: {type(error).__name__}: {error}")
            else:
                taken = self._elapsed() - before
                self._record["measurements"][name] = {**found, "taken": taken}
                for line in found.get("summary", ()):
                    self._say(f"  {line}")
        self._record["elapsed"] = self._elapsed()
        self._file.write_text(json.dumps(self._record, indent=2) + "\n")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _elapsed(self) -> float:
        return time.perf_counter() - self._started

    def _say(self, text: str) -> None:
        print(f"[{self._elapsed():6.1f} s] {text}", flush=True)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def synchronized(run: Callable[[], object]) -> Callable[[], None]:
    """Return a function that runs another one to its end on the device."""

    def whole() -> None:
        run()
        synchronize()

    return whole


def peak_above(run: Callable[[], object]) -> int:
    """Return the peak memory of a run above the memory before it, in bytes; of the GPU if there is one."""
    if not torch.cuda.is_available():
        before = reset_peak()
        run()
        return peak() - before
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def compared(seconds: Mapping[str, Sequence[float]], to: str) -> dict[str, Any]:
    """Return times with their ratios to one arm, and a line for each arm."""
    found = {arm: ratios(seconds, arm, to) for arm in seconds if arm != to}
    lines = [f"{to}: {1000 * statistics.median(seconds[to]):.3f} ms"]
    lines += [f"{arm}: {spread(values)} of {to}" for arm, values in found.items()]
    return {"seconds": dict(seconds), "ratios": found, "summary": lines}


class Bench:
    """A random model with its edits, and what is measured of them.

    Args:
        size: Sizes.
        rounds: Number of interleaved rounds.
        device: Device of the model.
    """

    def __init__(self, size: Size, rounds: int, device: str) -> None:
        self.size, self.rounds, self.device = size, rounds, device
        self.demonstrations = demonstrations_of(size.demonstrations)
        self.tokenizer = tokenizer_of(self.demonstrations)
        self.model: Any = None
        self.edits: dict[str, sealign.Edit] = {}
        self.activations: Any = None

    def build(self) -> dict[str, Any]:
        self.model = random_llama(self.tokenizer, self.device, torch.bfloat16, self.size.model)
        parameters = list(self.model.parameters())
        count, stored = sum(x.numel() for x in parameters), sum(x.nbytes for x in parameters)
        return {"parameters": count, "bytes": stored, "summary": [f"{count / 1e9:.2f} billion parameters"]}

    def collection(self) -> dict[str, Any]:
        """Time the collection of all layers against bare forward passes on the same batches."""
        given = self.model, self.tokenizer, self.demonstrations

        def collect() -> None:
            self.activations = sealign.collect_activations(*given, config=CONFIG)

        arms = {"Sealign": collect, "bare": lambda: bare(*given)}
        seconds = interleave({name: synchronized(run) for name, run in arms.items()}, self.rounds)
        peaks = {name: peak_above(run) for name, run in arms.items()}
        return compared(seconds, "bare") | {"peaks": peaks}

    def decomposition(self) -> dict[str, Any]:
        """Time the statistics and the decomposition of one layer on the CPU and on the device."""
        rows = self.activations.rows(self.activations.layers[len(self.activations.layers) // 2])
        config = sealign.SEAConfig(rank=self.size.rank)

        def on(device: str) -> Callable[[], object]:
            placed = [matrix.to(device) for matrix in rows]

            def run() -> None:
                layer = LayerStatistics(placed[0].shape[1], centered=False, feature_map="identity")
                layer.update(*placed)
                decompose(layer, config)

            return synchronized(run)

        return compared(interleave({place: on(place) for place in dict.fromkeys(("cpu", self.device))}, 3), "cpu")

    def fit(self) -> dict[str, Any]:
        """Fit the edits that are applied afterwards."""
        given = self.model, self.tokenizer, self.activations, self.demonstrations
        started = time.perf_counter()
        config = sealign.SEAConfig(layers="all", rank=self.size.rank)
        rescaled = sealign.fit_edit_from_activations(*given, config=config)
        taken = time.perf_counter() - started
        shift = sealign.MeanDifferenceConfig(site="mlp", layers="all")
        self.edits = {
            "SEA": rescaled,
            "SEA, unscaled": rescaled.with_normalization("none"),
            "shift": sealign.fit_edit_from_activations(*given, config=shift),
        }
        return {"seconds": taken, "ranks": {name: edit.rank for name, edit in self.edits.items()}}

    def merged(self) -> Any:
        """Return the model with the edit that has no rescaling in its weights; all other weights are shared."""
        changed = twin(self.model)
        for change in matrix_changes(self.model, self.edits["SEA, unscaled"]):
            matrix: Any = changed.get_submodule(change.matrix.path)
            weight = change.new_weight(matrix.weight).to(matrix.weight.dtype)
            matrix.weight = nn.Parameter(weight, requires_grad=False)
        return changed

    def edited(self, stack: ExitStack, *names: str, layers: int | None = None) -> dict[str, Any]:
        """Return the bare model and edited ones, all with the same weights, edited until the stack is closed."""
        models = {"bare": twin(self.model, layers), **{name: twin(self.model, layers) for name in names}}
        for name in names:
            edit = self.edits[name]
            if layers is not None:
                edit = edit.with_layers(edit.layers[:layers])
            stack.enter_context(sealign.apply_edit(models[name], edit, ignore_mismatch=layers is not None))
        return models

    def _timed(self, models: Mapping[str, Any], batch: int) -> tuple[dict[str, Any], dict[str, Any]]:
        calls = {name: steps(model, batch, self.size) for name, model in models.items()}
        found = {}
        for step, count in (("prefill", self.size.calls), ("decode", 10 * self.size.calls)):
            arms = {name: synchronized(by_step[step]) for name, by_step in calls.items()}
            found[step] = compared(interleave(arms, self.rounds, calls=count), "bare")
        lines = [f"{step}, {line}" for step, measured in found.items() for line in measured.pop("summary")]
        return {**found, "summary": lines}, calls

    @torch.no_grad()
    def eager(self, batch: int) -> dict[str, Any]:
        """Time all arms without compilation, and take the peak memory of their prefill."""
        with ExitStack() as stack:
            models = self.edited(stack, *self.edits) | {"merged": self.merged(), "dense": twin(self.model)}
            stack.enter_context(dense(models["dense"], self.edits["SEA"]))
            found, calls = self._timed(models, batch)
            peaks = {name: peak_above(by_step["prefill"]) for name, by_step in calls.items()}
            logits = {name: by_step["prefill"]().logits.float() for name, by_step in calls.items()}
        gaps = {
            "SEA to bare": gap(logits["SEA"], logits["bare"]),
            "SEA to dense": gap(logits["SEA"], logits["dense"]),
            "unscaled to merged": gap(logits["SEA, unscaled"], logits["merged"]),
        }
        return found | {"peaks": peaks, "largest_differences": gaps}

    @torch.no_grad()
    def compiled(self, batch: int) -> dict[str, Any]:
        """Time arms that are compiled by torch.compile, of the first layers only."""
        torch._dynamo.reset()
        with ExitStack() as stack:
            models = self.edited(stack, "SEA", "shift", layers=self.size.compiled_layers)
            expected = steps(models["SEA"], batch, self.size)["prefill"]().logits.float()
            compiled = {name: torch.compile(x, dynamic=False, backend=self.backend) for name, x in models.items()}
            found, calls = self._timed(compiled, batch)
            difference = gap(calls["SEA"]["prefill"]().logits.float(), expected)
        return found | {"layers": self.size.compiled_layers, "largest_difference_to_eager": difference}

    @property
    def backend(self) -> str:
        return "inductor" if self.device == "cuda" else "eager"

    @torch.no_grad()
    def graphs(self, batch: int) -> dict[str, Any]:
        """Time a decoding step of ``generate`` with a static cache, which compiles it and records CUDA graphs."""
        torch._dynamo.reset()
        with ExitStack() as stack:
            models = self.edited(stack, "SEA", "shift")
            arms = {name: Generation(model, batch, self.size) for name, model in models.items()}
            first = {name: arm.decoded() for name, arm in arms.items()}
            plain = {name: Generation(x, batch, self.size, static=False).decoded() for name, x in models.items()}
            seconds: dict[str, list[float]] = {name: [] for name in arms}
            for _ in range(self.rounds):
                for name, arm in arms.items():
                    seconds[name].append(arm.seconds_per_token())
        differences = {f"{name}, static to eager": gap(first[name], plain[name]) for name in models}
        differences["SEA to bare"] = gap(plain["SEA"], plain["bare"])
        return compared(seconds, "bare") | {"largest_differences": differences}

    @torch.no_grad()
    def operator(self, tokens: int) -> dict[str, Any]:
        """Time the edit of one layer's tokens alone; on a GPU in CUDA graphs, too, which have no launch overhead."""
        layer_edit = self.edits["SEA"].affine_edits[0]
        right, left = (x.to(self.device).contiguous() for x in (layer_edit.right, layer_edit.left.T))
        x = torch.randn(tokens, layer_edit.width, device=self.device, dtype=torch.bfloat16)
        torch._dynamo.reset()
        fused = torch.compile(edit_tokens, dynamic=False, backend=self.backend)
        given = x, right.T, left, None, 0.0, 0.7, True
        arms: dict[str, Callable[[], object]] = {
            "copy": lambda: x.clone(),
            "eager": lambda: edit_tokens(*given),
            "compiled": lambda: fused(*given),
        }
        arms = {name: repeated(run) for name, run in arms.items()}
        if self.device == "cuda":
            arms |= {f"{name}, graph": captured(run) for name, run in arms.items()}
        times = interleave({name: synchronized(run) for name, run in arms.items()}, self.rounds, calls=5)
        seconds = {name: [taken / REPEATS for taken in values] for name, values in times.items()}
        wide = [value.double() if isinstance(value, Tensor) else value for value in given]
        error = gap(edit_tokens(*given).double(), edit_tokens(*wide))  # type: ignore[arg-type]
        return compared(seconds, "copy") | {"largest_error": error, "largest_value": float(x.abs().max())}

    @torch.no_grad()
    def correctness(self) -> dict[str, Any]:
        """Compare fits and edited models of a smaller model on the device with float32 on the CPU."""
        some = self.demonstrations[:40]
        config = sealign.SEAConfig(layers="all", rank=min(self.size.rank, 5))
        reference = random_llama(self.tokenizer, "cpu", torch.float32, self.size.checked)
        edit = sealign.fit_edit(reference, self.tokenizer, some, config=config)
        moved = copy.deepcopy(reference).to(self.device)
        rows = sealign.collect_activations(reference, self.tokenizer, some).neutral
        expected = edit.apply_to(rows)
        again = sealign.fit_edit(moved, self.tokenizer, some, config=config).apply_to(rows)
        shift = max(float((again[i] - expected[i]).norm() / (expected[i] - rows[i]).norm()) for i in rows)
        ids = torch.randint(5, len(self.tokenizer), (3, 33), generator=torch.Generator().manual_seed(0))
        bare, edited = both(reference, edit, ids)
        found: dict[str, Any] = {"effect": gap(bare, edited), "fit on the device, of the change": shift}
        for dtype in (torch.float32, torch.bfloat16):
            there = both(moved.to(dtype), edit, ids.to(self.device))
            found[str(dtype)] = {"bare": gap(there[0], bare), "edited": gap(there[1], edited)}
        return {"largest_differences": found, "summary": [json.dumps(found)]}


class Generation:
    """Greedy generation by a model, timed token by token."""

    def __init__(self, model: Any, batch: int, size: Size, *, static: bool = True) -> None:
        self._model, self._count = model, size.new_tokens
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(5, model.config.vocab_size, (batch, size.context), generator=generator).to(model.device)
        self._given: dict[str, Any] = {"inputs": ids, "attention_mask": torch.ones_like(ids), "do_sample": False}
        if static:
            self._given["cache_implementation"] = "static"
            if model.device.type == "cpu":
                config: Any = CompileConfig(backend="eager")
                config._compile_all_devices = True
                self._given["compile_config"] = config

    def decoded(self) -> Tensor:
        """Return the logits of the first decoding step after a fixed token; the first call compiles."""
        steps = self._model.generate(
            **self._given,
            max_new_tokens=self._count,
            logits_processor=LogitsProcessorList([always_the_same]),
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits: Tensor = steps.logits[1].float()
        return logits

    def seconds_per_token(self) -> float:
        """Return the median time from one token to the next, without the prefill."""
        clock = Clock()
        self._model.generate(**self._given, max_new_tokens=self._count, stopping_criteria=StoppingCriteriaList([clock]))
        times = clock.times
        return statistics.median(after - before for before, after in pairwise(times))


def always_the_same(_input_ids: Tensor, scores: Tensor) -> Tensor:
    """Return scores that choose one token, so that different models decode the same text."""
    chosen = torch.full_like(scores, -torch.inf)
    chosen[:, 7] = 0
    return chosen


class Clock(StoppingCriteria):
    """A criterion that never stops and notes the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, _scores: Any, **_: Any) -> Any:
        synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def repeated(run: Callable[[], object]) -> Callable[[], None]:
    """Return a function that calls another one ``REPEATS`` times."""

    def whole() -> None:
        for _ in range(REPEATS):
            run()

    return whole


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """Return a function that replays what another one does on the GPU."""
    for _ in range(3):
        run()
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def gap(first: Tensor, second: Tensor) -> float:
    """Return the largest absolute difference."""
    return float((first - second.to(first.device)).abs().max())


def both(model: Any, edit: sealign.Edit, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of the bare and of the edited model, in float32."""
    bare = model(ids, use_cache=False).logits.float()
    with sealign.apply_edit(model, edit):
        return bare, model(ids, use_cache=False).logits.float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--time-limit", type=float, default=480, help="seconds after which nothing more is started")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="measure a tiny model, to try the script")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.small:
        parser.error("torch finds no GPU; pass --small to try the script on the CPU")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    size = SMALL if options.small else Size(checked=CHECKED)
    card = torch.cuda.get_device_name() if device == "cuda" else None
    context = {"machine": machine("transformers") | {"card": card}, "size": asdict(size), "rounds": options.rounds}
    results = Measurements(options.output, options.time_limit, **context)
    torch._dynamo.config.recompile_limit = 64  # of one function, and all arms compile the same
    bench = Bench(size, options.rounds, device)

    def costs(seconds: float) -> float:
        return 0 if options.small else seconds

    results.take("model", bench.build)
    results.take("collection", bench.collection)
    results.take("decomposition of a layer", bench.decomposition)
    results.take("fit of all layers", bench.fit)
    results.take("correctness", bench.correctness, expected=costs(10))
    for batch in size.batches:
        results.take(f"eager, batch {batch}", partial(bench.eager, batch), expected=costs(40))
    for tokens in size.tokens:
        name = f"operator, {tokens} tokens"
        results.take(name, partial(bench.operator, tokens), expected=costs(5))
    for batch in size.batches:
        name = f"generate with a static cache, batch {batch}"
        results.take(name, partial(bench.graphs, batch), expected=costs(120))
        results.take(f"compiled, batch {batch}", partial(bench.compiled, batch), expected=costs(60))
    if not results.complete:
        sys.exit(1)


if __name__ == "__main__":
    main()
