"""What the targets share: models, demonstrations, fits and evaluations, each made once and kept."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sealign.demonstrations.demonstration import Demonstration, demonstrations_hash
from sealign.demonstrations.sources import load_demonstrations
from sealign.edits.edit import Edit
from sealign.edits.provenance import build_edit, relative_changes
from sealign.edits.record import RECORD_NAME
from sealign.errors import SettingError
from sealign.evaluation.evaluate_edits import EvaluationConfig, evaluate
from sealign.evaluation.judge import Judge
from sealign.evaluation.results import Results
from sealign.files import read_tensors, write_bytes, write_tensors
from sealign.fitting.activations import Activations, layer_signatures
from sealign.fitting.collect_config import CollectConfig
from sealign.fitting.collecting import collect_activations
from sealign.methods.best_of_n import BestOfNConfig
from sealign.methods.method import METHOD_NAME
from sealign.methods.registry import Change, fit_method, load_change, parts_of
from sealign.methods.sea import fit_projections
from sealign.methods.sea_config import FitConfig
from sealign.models.embedded_model import EMBEDDED
from sealign.models.loading import load_model
from sealign.models.sites import select_layers
from sealign.models.structure import text_config, unwrap_model
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRUTHFULNESS = "halueval_qa"
"""What truthfulness edits learn from, in the paper 2000 demonstrations."""

FAIRNESS = "bbq"
"""What fairness edits learn from, in the paper 1000 demonstrations."""


PAPERS = {TRUTHFULNESS: 2000, FAIRNESS: 1000}
"""Demonstrations of each source in the paper."""

GENERATED = {"truthfulqa_gen": 50, "gsm8k_cot": 128, "nq_open": 16}
"""Tokens of an answer, at most: TruthfulQA's as in the paper's code, the others because a broken model never ends."""

BATCH = 32
"""Sequences run together where answers are written or scoring is not packed: a step reads the weights once for all."""


@dataclass(frozen=True)
class ReproduceConfig:
    """What is made again, and with what.

    Attributes:
        output: the folder for all targets.
        model: whatever ``load_model`` knows.
        models: further ones, for the targets that compare models.
        data_dir: a folder with demonstrations and tasks in the Hub's schemas; the Hub if None.
        limit: items of each task; all if None.
        demonstrations: by source, how many are drawn at most; the paper's numbers. All where there are fewer.
        amateur: of contrastive decoding, a smaller model with the same tokenizer; None leaves its row out and says so.
        judge: of Truth and Info; None leaves them out and says so.
        seed: of draws, fits and resampling.
        dtype, device: as for ``load_model``.

    Raises:
        SettingError: the limit is below 2, too few for an interval.
    """

    output: Path
    model: str = EMBEDDED
    models: tuple[str, ...] = ()
    data_dir: Path | None = None
    limit: int | None = None
    demonstrations: Mapping[str, int] = field(default_factory=lambda: dict(PAPERS))
    amateur: str | None = None
    judge: Judge | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 2:
            raise SettingError(f"limit is {self.limit}, but an interval needs at least 2 items; try 60")


class Workbench:
    """Makes what targets ask for, and keeps it below ``output/work``, so that a run that was stopped goes on.

    Args:
        config: what is made again.
        track: shows progress.
    """

    def __init__(self, config: ReproduceConfig, *, track: Track = no_progress) -> None:
        self.config = config
        self.track = track
        self.folder = Path(config.output) / "work"
        self._name = ""
        self._loaded: Any = None
        self._seconds: dict[str, float] = {}
        self._demonstrations: dict[str, list[Demonstration]] = {}

    def model(self, name: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return a model and its tokenizer; one is held at a time."""
        name = name or self.config.model
        if name != self._name:
            self._loaded = None  # before the next is loaded, for memory
            self._loaded = load_model(name, dtype=self.config.dtype, device=self.config.device)
            self._name = name
        model, tokenizer = self._loaded
        return model, tokenizer

    def demonstrations(self, source: str) -> list[Demonstration]:
        """Return the demonstrations of a source: the configuration's number, or all where there are fewer.

        Raises:
            DemonstrationError: the source cannot be read.
        """
        if source not in self._demonstrations:
            where: Any = {"data_dir": self.config.data_dir, "seed": self.config.seed}
            count = len(load_demonstrations(source, **where))
            most = min(self.config.demonstrations.get(source, count), count)
            self._demonstrations[source] = load_demonstrations(source, limit=most, **where)
        return self._demonstrations[source]

    def trained(self, source: str) -> list[Demonstration]:
        """Return the demonstrations that trainings learn from: all, or with a limit as many as items are scored.

        A training costs as much as many evaluations, and a limit asks for a first look.
        """
        learnt = self.demonstrations(source)
        return learnt if self.config.limit is None else learnt[: self.config.limit]

    @property
    def draws(self) -> int:
        """Answers that Best-of-N draws: as many as by default, or with a limit half of them."""
        return BestOfNConfig().n // (1 if self.config.limit is None else 2)

    def edit(
        self,
        sources: Mapping[str, Sequence[int] | None] | str,
        config: FitConfig,
    ) -> Edit:
        """Return the edit of the loaded model that demonstrations give.

        Args:
            sources: of the demonstrations; by name, the indices of those that are used, or None for all.
            config: settings of the fit.
        """
        chosen = {sources: None} if isinstance(sources, str) else sources
        learnt = [item for name, rows in chosen.items() for item in _at(self.demonstrations(name), rows)]
        folder = self.folder / "edits" / self._key("edit", learnt, config)
        if not (folder / RECORD_NAME).is_file():
            parts = [
                rows_of(self.activations(name, config.collect_config(), config.site), rows)
                for name, rows in chosen.items()
            ]
            started = time.perf_counter()
            edit = self._fit(learnt, join_activations(parts), config)
            seconds = time.perf_counter() - started
            for name, rows in chosen.items():
                file = self._activations_file(name, config.collect_config(), config.site)
                share = 1.0 if rows is None else len(rows) / len(self.demonstrations(name))
                seconds += share * _read_seconds(file)
            folder.parent.mkdir(parents=True, exist_ok=True)
            _write_seconds(folder, seconds)
            edit.save_pretrained(folder)
        edit = Edit.from_pretrained(folder)
        self._seconds[edit.hash] = _read_seconds(folder)
        return edit

    def fit_seconds(self, change: Change) -> float:
        """Return how long a change of this bench took to fit, all its parts together.

        The collection of an edit's activations, at all layers, is in it: in full for each edit that shares it, in
        proportion where only some demonstrations of it are used.
        """
        return sum(
            self._seconds[part.hash] if isinstance(part, Edit) else part.record.fit_seconds for part in parts_of(change)
        )

    def _fit(self, learnt: Sequence[Demonstration], activations: Activations, config: FitConfig) -> Edit:
        model, tokenizer = self.model(self._name)
        depth = text_config(unwrap_model(model)).num_hidden_layers
        signatures = layer_signatures(activations, centered=config.centered)
        layers = select_layers(config.layers, depth, signatures)
        projections = fit_projections(activations, config=config, layers=layers, track=self.track)
        changes = relative_changes(projections, activations.neutral, config.settings())
        return build_edit(model, tokenizer, learnt, projections, changes, signatures, config)

    def activations(self, source: str, config: CollectConfig = CollectConfig(), site: str = "mlp") -> Activations:
        """Return the activations of all layers of the loaded model over the demonstrations of a source.

        They are collected once, and read back from ``work`` by whatever asks for them again.
        """
        learnt = self.demonstrations(source)
        file = self._activations_file(source, config, site)
        if file.is_file():
            return _read_activations(file, site)
        model, tokenizer = self.model(self._name)
        started = time.perf_counter()
        found = collect_activations(
            model,
            tokenizer,
            learnt,
            site=site,
            config=config,
            checkpoint_dir=self.folder / "activations",
            track=self.track,
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        _write_seconds(file, time.perf_counter() - started)
        roles = {"neutral": found.neutral, "positive": found.positive, "negative": found.negative}
        write_tensors(file, {f"{role}.{layer}": x for role, by_layer in roles.items() for layer, x in by_layer.items()})
        return found

    def _activations_file(self, source: str, config: CollectConfig, site: str) -> Path:
        key = self._key("activations", self.demonstrations(source), (config, site))
        return self.folder / "activations" / f"{key}.safetensors"

    def method(self, name: str, learnt: Sequence[Demonstration], config: Any = None) -> Change:
        """Return a fitted method."""
        model, tokenizer = self.model(self._name)
        key = self._key(name, learnt, config)
        folder = self.folder / "methods" / f"{name}-{key}"
        if not (folder / METHOD_NAME).is_file():
            training = self.folder / "trainings" / key
            fitted = fit_method(
                name, model, tokenizer, learnt, config=config, checkpoint_dir=training, track=self.track
            )
            fitted.save_pretrained(folder)
        return load_change(folder)

    def evaluate(
        self,
        arms: Mapping[str, Change],
        tasks: Sequence[str],
        *,
        control_seeds: Sequence[int] = (),
        preamble: str = "",
    ) -> Results:
        """Return the scores of the base model and of changes; what two targets score alike is scored once."""
        model, tokenizer = self.model(self._name)
        settings = EvaluationConfig(
            tasks=tuple(tasks),
            data_dir=self.config.data_dir,
            limit=self.config.limit,
            control_seeds=tuple(control_seeds),
            reversed_control=False,
            preamble=preamble,
            batch_size=BATCH,
            max_new_tokens=GENERATED,
            judge=self.config.judge,
        )
        hashes = {name: change.hash for name, change in arms.items()}
        name = hashlib.sha256(json.dumps([self._name, hashes, repr(settings)]).encode()).hexdigest()[:16]
        return evaluate(
            model,
            tokenizer,
            arms,
            config=settings,
            output=self.folder / "evaluations" / name,
            journal=self.folder / "journal",
            track=self.track,
        )

    def _key(self, kind: str, learnt: Sequence[Demonstration], settings: object) -> str:
        parts = [kind, self._name, self.config.dtype, demonstrations_hash(learnt), repr(settings)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _at(items: Sequence[Demonstration], rows: Sequence[int] | None) -> Sequence[Demonstration]:
    return items if rows is None else [items[row] for row in rows]


def rows_of(activations: Activations, rows: Sequence[int] | None) -> Activations:
    """Return the activations of some demonstrations; all for None."""
    if rows is None:
        return activations

    def some(by_layer: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return {layer: matrix[list(rows)] for layer, matrix in by_layer.items()}

    return Activations(
        activations.site, some(activations.neutral), some(activations.positive), some(activations.negative)
    )


def join_activations(parts: Sequence[Activations]) -> Activations:
    """Return the activations of several sets of demonstrations as of one."""
    if len(parts) == 1:
        return parts[0]

    def joined(role: str) -> dict[int, Tensor]:
        return {layer: torch.cat([getattr(part, role)[layer] for part in parts]) for layer in parts[0].neutral}

    return Activations(parts[0].site, joined("neutral"), joined("positive"), joined("negative"))


def _write_seconds(beside: Path, seconds: float) -> None:
    write_bytes(beside.with_suffix(".seconds"), f"{seconds:.3f}\n".encode())


def _read_seconds(beside: Path) -> float:
    return float(beside.with_suffix(".seconds").read_text())


def _read_activations(file: Path, site: str) -> Activations:
    roles: dict[str, dict[int, Tensor]] = {"neutral": {}, "positive": {}, "negative": {}}
    for name, matrix in read_tensors(file).items():
        role, layer = name.split(".")
        roles[role][int(layer)] = matrix
    return Activations(site, **{role: dict(sorted(by_layer.items())) for role, by_layer in roles.items()})
