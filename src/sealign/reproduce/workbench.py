"""What the targets share: models, demonstrations, fits and evaluations, each made once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sealign.activations import Activations, collect_activations
from sealign.baselines.method import METHOD_NAME
from sealign.baselines.registry import Change, fit_method, load_change
from sealign.collect_config import CollectConfig
from sealign.demonstrations import Demonstration, demonstrations_hash, load_demonstrations
from sealign.edit import SpectralEdit
from sealign.errors import DemonstrationError, SettingError
from sealign.evaluation.judge import Judge
from sealign.evaluation.results import Results
from sealign.evaluation.run import EvaluationConfig, evaluate
from sealign.fit import fit_projections, layer_signatures
from sealign.fit_config import FitConfig, select_layers
from sealign.models import EMBEDDED, load_model
from sealign.progress import Track, no_progress
from sealign.provenance import build_edit
from sealign.sites import text_config, unwrap_model
from sealign.storage import CONFIG_NAME

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRUTHFULNESS = "halueval_qa"
"""What truthfulness edits learn from, in the paper 2000 demonstrations."""

FAIRNESS = "bbq"
"""What fairness edits learn from, in the paper 1000 demonstrations."""


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
    demonstrations: Mapping[str, int] = field(default_factory=lambda: {TRUTHFULNESS: 2000, FAIRNESS: 1000})
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
        self._collected: dict[str, Activations] = {}

    def model(self, name: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return a model and its tokenizer; one is held at a time."""
        name = name or self.config.model
        if name != self._name:
            self._loaded, self._collected = None, {}  # before the next is loaded, for memory
            self._loaded = load_model(name, dtype=self.config.dtype, device=self.config.device)
            self._name = name
        model, tokenizer = self._loaded
        return model, tokenizer

    def demonstrations(self, source: str, count: int | None = None, *, seed: int | None = None) -> list[Demonstration]:
        """Return demonstrations of a source: the configuration's number, or so many of them.

        Raises:
            DemonstrationError: fewer are there than are asked for.
        """
        everything = load_demonstrations(source, data_dir=self.config.data_dir, seed=self.config.seed)
        most = min(self.config.demonstrations.get(source, len(everything)), len(everything))
        wanted = most if count is None else count
        if wanted > most:
            raise DemonstrationError(f"{source} has {most} demonstrations, but {wanted} are asked for; ask for fewer")
        drawn = self.config.seed if seed is None else seed
        return load_demonstrations(source, data_dir=self.config.data_dir, limit=wanted, seed=drawn)

    def edit(
        self,
        learnt: Sequence[Demonstration],
        config: FitConfig,
        *,
        model: str | None = None,
    ) -> SpectralEdit:
        """Return the edit that demonstrations give; activations are collected once for all edits that share them."""
        loaded, tokenizer = self.model(model)
        folder = self.folder / "edits" / self._key("edit", learnt, config)
        if not (folder / CONFIG_NAME).is_file():
            self.fit(loaded, tokenizer, learnt, config).save_pretrained(folder)
        return SpectralEdit.from_pretrained(folder)

    def fit(self, model: Any, tokenizer: Any, learnt: Sequence[Demonstration], config: FitConfig) -> SpectralEdit:
        """Return a fit from collected activations."""
        activations = self.activations(learnt, config.collect_config(), config.site)
        depth = text_config(unwrap_model(model)).num_hidden_layers
        signatures = layer_signatures(activations, centered=config.centered)
        layers = select_layers(config.layers, depth, signatures)
        projections = fit_projections(activations, config=config, layers=layers, track=self.track)
        neutral = activations.neutral
        return build_edit(model, tokenizer, learnt, projections, neutral, signatures, config)

    def activations(
        self, learnt: Sequence[Demonstration], config: CollectConfig = CollectConfig(), site: str = "mlp"
    ) -> Activations:
        """Return the activations of all layers of the model that is loaded."""
        key = self._key("activations", learnt, (config, site))
        if key not in self._collected:
            model, tokenizer = self.model(self._name)
            self._collected = {
                key: collect_activations(
                    model,
                    tokenizer,
                    learnt,
                    site=site,
                    config=config,
                    checkpoint_dir=self.folder / "activations",
                    track=self.track,
                )
            }
        return self._collected[key]

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
