"""A valid command line for each command, quick on a tiny model, and the library below it, whose calls are recorded."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel

import sealign
from sealign.demonstrations.demonstration import Demonstration
from sealign.edits.intervention import Intervention
from sealign.evaluation.tuning import TuneResult
from tests.evaluation_data import planted_results
from tests.tiny_models import build_model


@dataclasses.dataclass(frozen=True)
class Places:
    """What command lines name: a model, an edit that is a LoRA, a rescaled one, a shift, and files."""

    model: Path
    other_model: Path
    linear: Path
    rescaled: Path
    shift: Path
    adapter: Path
    rows: Path
    results: tuple[Path, Path]
    sweep: Path
    prompts: Path
    gguf: Path


def command_lines(places: Places, output: Path) -> dict[str, list[object]]:
    """Return the arguments of each command; those that write have their output last."""
    rows: list[object] = ["--demonstrations", places.rows]
    model: list[object] = ["--model", places.model]
    to: list[object] = ["--output", output]
    return {
        "demo": [*model, "--behaviours", "fairness", *to],
        "fit": [*model, *rows, "--layers", "1,2", "--rank", 1, *to],
        "inspect": ["--edit", places.linear],
        "generate": ["--edit", places.linear, "--prompt", "What is ice?", "--max-new-tokens", 6],
        "chat": ["--edit", places.linear, "--max-new-tokens", 6],
        "playground": ["--edit", f"mild={places.linear}"],
        "evaluate": ["--edit", f"mild={places.linear}", *rows, *to],
        "compare": [*places.results],
        "tune": [*model, *rows, *to],
        "plot tsne": [*model, *rows, *to],
        "plot spectrum": [*model, *rows, *to],
        "plot signature": [*model, *rows, *to],
        "plot sweep": [places.sweep, *to],
        "plot effect": ["--edit", places.linear, *rows, *to],
        "export lora": ["--edit", places.linear, *to],
        "export merged": ["--edit", places.linear, *to],
        "export gguf": ["--edit", places.linear, "--base", places.gguf, *to],
        "export control-vector": ["--edit", places.shift, *to],
        "verify": ["--edit", places.linear, "--against", f"lora={places.adapter}", "--max-new-tokens", 4],
        "serve": ["--edit", f"mild={places.linear}"],
        "reproduce": ["table-activations", *model, *to],
        "edits search": [],
        "edits pull": ["owner/polite", *to],
        "edits push": [places.linear, "owner/polite"],
        "cache list": [],
        "cache clear": [],
    }


def other_command_lines(places: Places, output: Path) -> list[tuple[str, list[object]]]:
    """Return command lines with other inputs, on which options may lack what they act on."""
    model: list[object] = ["--model", places.model]
    to: list[object] = ["--output", output]
    method: list[object] = ["--method", "mean_difference", "--demonstrations", places.rows]
    tasks: list[object] = ["--tasks", "truthfulqa_mc1", "--data-dir", places.linear.parent / "data"]
    served: list[object] = ["--server", "http://127.0.0.1:9", "--edits-dir", places.linear.parent]
    return [
        ("fit", [*model, "--method", "dola", *to]),
        ("fit", [*model, "--method", "icl", "--demonstrations", places.rows, *to]),
        ("evaluate", [*model, *tasks, *to]),
        ("evaluate", [*model, "--prompts", places.prompts, *to]),
        ("evaluate", ["--edit", f"mild={places.linear}", "--prompts", places.prompts, *to]),
        ("evaluate", [*model, *method, "--holdout", 0.5, *to]),
        ("evaluate", ["--edit", f"mild={places.linear}", "--demonstrations", places.rows, *served, *to]),
        ("tune", [*model, "--demonstrations", places.rows, *to]),
        ("serve", ["--edits-dir", places.linear.parent]),
        ("reproduce", ["behaviours", *model, *to]),
        ("reproduce", ["figure-signature", *model, *to]),
    ]


def plain(value: Any) -> Any:
    """Return what identifies a value, as a value that can be compared; the type of anything unknown."""
    if isinstance(value, BaseModel):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Intervention):
        return value.hash
    if isinstance(value, Demonstration):
        return value.hash
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(item) for item in value]
    return value if isinstance(value, int | float | str | Path | None) else type(value).__name__


class Library:
    """The library below the commands: slow functions are replaced, and the arguments of all are recorded."""

    def __init__(self, patch: pytest.MonkeyPatch, places: Places, tokenizer: Any, cache: Callable[..., Any]) -> None:
        # First imported below, they would keep the functions that replace those of this library.
        for name in ("sealign.reproduce.targets", "sealign.evaluation.tuning"):
            importlib.import_module(name)
        self.calls: list[Any] = []
        self._patch, self._cache = patch, cache
        edit = sealign.load_edit(places.linear)
        results = planted_results(0.05)
        built: dict[str, Any] = {}

        def load(name: str, **_: Any) -> Any:
            if name not in built:
                changes = {"num_key_value_heads": 4} if name == str(places.other_model) else {}
                built[name] = build_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048, **changes)
                built[name].name_or_path = name
            return copy.deepcopy(built[name]), tokenizer  # a LoRA is loaded into the model itself

        self.replace("sealign.models.loading.load_model", load)
        self.replace("sealign.export.deployments.load_model", load)
        for name in ("open_checkpoint", "checkpoint_folder", "load_skeleton"):
            self.record(f"sealign.models.loading.{name}")
        self.record("sealign.methods.registry.fit_edit")
        self.record("sealign.evaluation.answers.compare_answers")
        self.record("sealign.edits.attach.apply_edit")
        self.record("sealign.export.verify.reference_outputs")
        for name in ("lora.export_lora", "merged.export_merged", "gguf.export_gguf", "gguf.export_gguf_lora"):
            self.record(f"sealign.export.{name}")
        self.record("sealign.export.control_vector.export_control_vector")
        self.once("sealign.evaluation.strength_choice.choose_strength")
        self.replace("sealign.evaluation.evaluate_edits.evaluate", lambda *_, **__: results)
        self.replace("sealign.evaluation.served_model.ServedModel", nothing)
        engine = SimpleNamespace(skeleton=load(str(places.model))[0], tokenizer=tokenizer)
        self.replace("sealign.evaluation.engines.served_engine", lambda *_, **__: engine)
        self.once("sealign.evaluation.comparison.report_edits")
        self.once("sealign.evaluation.comparison.compare_results")
        self.replace("sealign.figures.report.write_report", nothing)
        tuned = TuneResult([], [])
        self.replace("sealign.evaluation.tuning.tune", lambda *_, **__: tuned)
        self.replace("sealign.figures.evaluation_figures.layer_map_figure", nothing)
        self.replace("sealign.figures.style.save_figure", nothing)
        self.replace("sealign.reproduce.targets.reproduce", lambda *_, **__: [])
        self.replace("sealign.evaluation.judge.EndpointJudge", lambda *_: None)
        measure = found("sealign.evaluation.answer_measures.load_scorer")("distinct-2")
        self.replace("sealign.evaluation.answer_classifier.load_classifier", lambda *_, **__: measure)
        self.replace("sealign.evaluation.judge.LocalJudge", lambda *_, **__: None)
        self.record("sealign.playground.offered_edits.OfferedEdits")
        self.replace("sealign.playground.web_server.open_socket", lambda *_: contextlib.nullcontext())
        self.replace("sealign.playground.web_server.serve_page", nothing)
        self.replace("sealign.cache.clear_cache", lambda *_: ([], []))
        self.replace("sealign.edits.gallery.search_edits", nothing)
        self.replace("sealign.edits.gallery.push_edit", lambda *_, **__: "https://huggingface.co/owner/polite/commit/1")
        self.replace("sealign.edits.gallery.pull_edit", lambda *_, **__: edit.record)
        self.replace("sealign.serving.launch.require_vllm", nothing)
        self.replace("sealign.serving.launch.server_command", lambda *_, **__: ([], {}))
        self.replace("sealign.serving.launch.canary_variables", lambda *_: {})
        self.replace("sealign.serving.launch.start_server", nothing)
        shown = SimpleNamespace(edit=edit, behaviour="fairness", verdict=SimpleNamespace(sentence="Helps."))
        self.replace("sealign.reproduce.embedded_demo.run_demo", lambda *_, **__: shown)
        self._patch.setattr("sealign.cli.demo._show", nothing)
        self._patch.setattr("sealign.cli.demo._as_data", lambda result, folder: {"saved": str(folder)})
        self.replace("sealign.figures.save_figure", touch)
        self.replace("sealign.figures.save_points", lambda points, path: path)
        self.record("sealign.fitting.collecting.collect_activations")
        drawn = (
            "tsne_points",
            "activation_spectra",
            "spectrum",
            "spectrum_points",
            "activation_signatures",
            "signature",
        )
        for name in (*drawn, "sweep_points", "sweep", "signature_points", "effect_points", "plane"):
            self.replace(f"sealign.figures.{name}", nothing)

    def replace(self, place: str, function: Callable[..., Any]) -> None:
        """Replace a function of the library, and record the arguments of its calls."""
        module, _, name = place.rpartition(".")

        def recorded(*args: Any, **given: Any) -> Any:
            self.calls.append((name, plain(args), plain(given)))
            return function(*args, **given)

        self._patch.setattr(importlib.import_module(module), name, recorded)

    def record(self, place: str) -> None:
        """Record the arguments of the calls of a function that stays what it is."""
        self.replace(place, found(place))

    def once(self, place: str) -> None:
        """Record the arguments of calls, which all have the result of the first one."""
        self.replace(place, functools.partial(self._cache, place, found(place)))


def found(place: str) -> Any:
    """Return the function at a dotted path."""
    module, _, name = place.rpartition(".")
    return getattr(importlib.import_module(module), name)


def touch(_: Any, path: Path) -> list[Path]:
    """Write an empty figure."""
    path.with_suffix(".pdf").touch()
    return [path.with_suffix(".pdf")]


def nothing(*_: Any, **__: Any) -> list[Any]:
    """Do nothing."""
    return []
