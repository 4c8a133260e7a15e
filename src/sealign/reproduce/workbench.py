"""Cache of models, demonstrations, fits and evaluations shared by all targets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sealign.configuration import Config
from sealign.demonstrations.demonstration import Demonstration, demonstrations_hash
from sealign.demonstrations.sources import load_demonstrations
from sealign.edits.edit import Edit
from sealign.edits.intervention import Intervention
from sealign.edits.record import RECORD_NAME
from sealign.evaluation.evaluate_edits import evaluate
from sealign.evaluation.evaluation_config import EvaluationConfig
from sealign.evaluation.results import Results
from sealign.files import write_bytes
from sealign.fitting.activations import Activations
from sealign.fitting.collect_config import CollectConfig
from sealign.fitting.collecting import collect_activations
from sealign.fitting.edit_config import EditConfig
from sealign.methods.best_of_n import BestOfNConfig
from sealign.methods.fit_cache import fit_or_load
from sealign.methods.registry import fit_edit_from_activations
from sealign.models.loading import load_model
from sealign.progress import Track, no_progress
from sealign.reproduce.reproduce_config import ReproduceConfig
from sealign.reproduce.saved_activations import join_activations, read_activations, save_activations, select_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GENERATED = {"truthfulqa_gen": 50, "gsm8k_cot": 128, "nq_open": 16}
"""Mapping from task to the maximum number of generated tokens of an answer.

The TruthfulQA value is from the paper's code. The others limit generation for models that never emit an end token.
"""

BATCH_SIZE = 32
"""Number of sequences to run together in generation."""


class Workbench:
    """Computes the inputs of the targets and saves them below ``output/work``, so that an interrupted run can continue.

    Args:
        config: Settings of the reproduction.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.
    """

    def __init__(self, config: ReproduceConfig, *, track: Track = no_progress) -> None:
        self.config = config
        self.track = track
        self.folder: Path = config.output / "work"
        self._name = ""
        self._loaded: Any = None
        self._demonstrations: dict[tuple[str, int | None], list[Demonstration]] = {}

    def model(self, name: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return a model and its tokenizer; only the most recent model is kept in memory.

        Args:
            name: Name or path of the model. Default: the configured model.
        """
        name = name or self.config.model
        if name != self._name:
            self._loaded = None  # releases the memory before the next model is loaded
            self._loaded = load_model(name, **self.config.loading)
            self._name = name
        model, tokenizer = self._loaded
        return model, tokenizer

    def demonstrations(self, source: str, most: int | None = None) -> list[Demonstration]:
        """Return the demonstrations of a source, up to a maximum number.

        Args:
            source: Name of the source.
            most: The maximum number; that of the configuration for this source if None.

        Raises:
            DemonstrationError: The source cannot be read.
        """
        if (source, most) not in self._demonstrations:
            where: Any = {"data_dir": self.config.data_dir, "seed": self.config.seed}
            count = len(load_demonstrations(source, **where))
            limit = min(most or self.config.demonstrations.get(source, count), count)
            self._demonstrations[source, most] = load_demonstrations(source, limit=limit, **where)
        return self._demonstrations[source, most]

    def training_demonstrations(self, source: str) -> list[Demonstration]:
        """Return the demonstrations for methods that train, limited to ``config.limit`` if set.

        Training is slow, so the limit also applies here.

        Args:
            source: Name of the source.
        """
        return self.demonstrations(source)[: self.config.limit]

    @property
    def draws(self) -> int:
        """Number of answers that Best-of-N samples: the default, halved if ``config.limit`` is set."""
        return BestOfNConfig().n // (1 if self.config.limit is None else 2)

    def edit(self, sources: Mapping[str, Sequence[int] | None] | str, config: EditConfig) -> Edit:
        """Return an edit of the loaded model, fitted from activations that are collected once.

        The recorded duration includes collection time, scaled by the fraction of demonstrations used.

        Args:
            sources: Source name, or a mapping from source name to the indices of the demonstrations to use (None for
                all).
            config: Configuration of a method that edits activations.
        """
        chosen = {sources: None} if isinstance(sources, str) else sources
        used = [item for name, rows in chosen.items() for item in _at(self.demonstrations(name), rows)]
        folder = self.folder / "edits" / self._key(used, config)
        if not (folder / RECORD_NAME).is_file():
            model, tokenizer = self.model(self._name)
            settings, site = config.collect_config(), config.read_site
            parts, seconds = [], 0.0
            for name, rows in chosen.items():
                parts.append(select_rows(self.activations(name, settings, site), rows))
                fraction = 1.0 if rows is None else len(rows) / len(self.demonstrations(name))
                seconds += fraction * _read_seconds(self._activations_file(name, settings, site))
            edit = fit_edit_from_activations(
                model, tokenizer, join_activations(parts), used, config=config, track=self.track
            )
            record = dataclasses.replace(edit.record, fit_seconds=round(edit.fit_seconds + seconds, 3))
            dataclasses.replace(edit, record=record).save_pretrained(folder, overwrite=True)
        return Edit.from_pretrained(folder)

    def fit(self, config: Config, demonstrations: Sequence[Demonstration] = ()) -> Intervention:
        """Return an intervention of any method, fitted for the loaded model.

        Args:
            config: Configuration of the method.
            demonstrations: Demonstrations to fit on.
        """
        model, tokenizer = self.model(self._name)
        folder = self.folder / "edits"
        return fit_or_load(model, tokenizer, demonstrations, config=config, folder=folder, track=self.track)

    def activations(self, source: str, config: CollectConfig = CollectConfig(), site: str = "mlp") -> Activations:
        """Return the activations of all layers of the loaded model on the demonstrations of a source.

        The activations are collected once and saved.

        Args:
            source: Name of the source.
            config: Collection settings.
            site: Site at which activations are read.
        """
        file = self._activations_file(source, config, site)
        if file.is_file():
            return read_activations(file, site)
        model, tokenizer = self.model(self._name)
        started = time.perf_counter()
        found = collect_activations(
            model,
            tokenizer,
            self.demonstrations(source),
            site=site,
            config=config,
            checkpoint_dir=self.folder / "activations",
            track=self.track,
        )
        write_bytes(file.with_suffix(".seconds"), f"{time.perf_counter() - started:.3f}\n".encode())
        save_activations(found, file)
        return found

    def _activations_file(self, source: str, config: CollectConfig, site: str) -> Path:
        return self.folder / "activations" / f"{self._key(self.demonstrations(source), config, site)}.safetensors"

    def evaluate(
        self,
        edits: Mapping[str, Intervention],
        tasks: Sequence[str],
        *,
        control_seeds: Sequence[int] = (),
        preamble: str = "",
    ) -> Results:
        """Return the results of the base model and of edits; scores that several targets need are computed once.

        Args:
            edits: Mapping from name to edit.
            tasks: Names of tasks.
            control_seeds: Seeds of the random controls.
            preamble: Text put before every prompt.
        """
        model, tokenizer = self.model(self._name)
        settings = EvaluationConfig(
            tasks=tasks,
            data_dir=self.config.data_dir,
            limit=self.config.limit,
            control_seeds=control_seeds,
            reversed_control=False,
            preamble=preamble,
            batch_size=BATCH_SIZE,
            max_new_tokens=GENERATED,
            judge=self.config.judge,
        )
        hashes = {name: edit.hash for name, edit in edits.items()}
        name = _short_hash([self._name, hashes, settings.dump()])
        return evaluate(
            model,
            tokenizer,
            edits,
            config=settings,
            output=self.folder / "evaluations" / name,
            journal=self.folder / "journal",
            track=self.track,
        )

    def _key(self, demonstrations: Sequence[Demonstration], config: Config, *parts: str) -> str:
        """Return a key derived from the loaded model, the demonstrations and the configuration."""
        settings = [type(config).__name__, config.dump()]
        return _short_hash([self._name, self.config.dtype, demonstrations_hash(demonstrations), settings, *parts])


def _short_hash(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _at(items: Sequence[Demonstration], rows: Sequence[int] | None) -> Sequence[Demonstration]:
    return items if rows is None else [items[row] for row in rows]


def _read_seconds(activations_file: Path) -> float:
    return float(activations_file.with_suffix(".seconds").read_text())
