"""Search the settings of an edit for the best score within a damage budget, then test the winner once."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna

from sealign.demonstrations.demonstration import Demonstration, demonstrations_hash
from sealign.edits.attach import apply_edit
from sealign.edits.edit import Edit
from sealign.errors import DegenerateError, SettingError
from sealign.evaluation.comparison import EditReport, report_edits
from sealign.evaluation.damage import bundled_texts, increase_with_bound, text_losses
from sealign.evaluation.evaluate_edits import evaluate, run_task
from sealign.evaluation.evaluation_config import EvaluationConfig
from sealign.evaluation.harness import SealignLM
from sealign.evaluation.item_scores import ItemScores, headline_metrics, join_scores
from sealign.evaluation.local_tasks import task_manager
from sealign.evaluation.results import Results
from sealign.evaluation.search_space import SearchSpace
from sealign.evaluation.statistics import gain
from sealign.evaluation.trials import TrialRecord, best_trial, read_trial, trial_config, trials_csv
from sealign.evaluation.tuning_config import TuneConfig, TunedConfig
from sealign.files import write_bytes
from sealign.fitting.activations import Activations
from sealign.fitting.collecting import collect_activations
from sealign.methods.registry import fit_edit_from_activations
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINNER = "winner"
"""Name of the winning edit in the results."""

STUDY_NAME = "study.log"
"""File name of the study."""

CHUNKS = 4
"""Number of parts of the development items; a trial may be pruned after each."""


@dataclass(frozen=True)
class TuneResult:
    """The result of tuning.

    Attributes:
        trials: All trials.
        winner: The trial with the highest development gain within the budget; None if none has a gain.
        edit: Edit of the winner.
        results: Results of the winner on the test items, with all controls.
        report: Statistics and verdict of these results.
    """

    trials: list[TrialRecord]
    winner: TrialRecord | None = None
    edit: Edit | None = None
    results: Results | None = None
    report: EditReport | None = None


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    *,
    config: TuneConfig,
    output: str | Path,
    command: str = "",
    track: Track = no_progress,
) -> TuneResult:
    """Search the settings of an edit, save the best edit, and test it once on items that the search did not use.

    Each trial draws the site, the layers, the rescaling, the settings of the method, and a fraction of the damage
    budget. The strength is chosen to use this fraction: the loss on neutral text increases about as the square of the
    strength. The upper bound of the damage, not its mean, must be within the budget, so that the damage on other texts
    is likely to be within it, too. A trial is then scored on the development items part by part, and pruned if it is in
    the lowest quarter of earlier trials. Activations are collected once per site. The study is saved in ``study.log``;
    the same call continues it.

    Args:
        model: The base model.
        tokenizer: Tokenizer of the model.
        demonstrations: Demonstrations to fit on; at least 2.
        config: Settings of the search.
        output: Folder to write to: the study, ``trials.csv``, ``edit`` and ``evaluation``.
        command: Command line that computes the results again, for the record.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.

    Raises:
        SettingError: A setting is out of range, or the folder has the study of another search.
        DemonstrationError, ActivationError: As for ``fit_edit``.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    study = _open_study(folder, config, demonstrations)
    with task_manager(config.tasks, config.data_dir) as manager:
        search = _Search(model, tokenizer, demonstrations, config, manager, folder, track)
        search.run(study)
        trials = [read_trial(trial) for trial in study.trials]
        write_bytes(folder / "trials.csv", trials_csv(trials).encode())
        winner = best_trial(trials, config.max_damage)
        if winner is None:
            return TuneResult(trials)
        edit = search.edit(trial_config(config.fit, winner).replace(strength=winner.strength or 0.0))
        edit.save_pretrained(folder / "edit")
        results = search.test(edit, command)
    (report,) = report_edits(results, max_damage=config.max_damage, seed=config.seed)
    return TuneResult(trials, winner, edit, results, report)


def _open_study(folder: Path, config: TuneConfig, demonstrations: Sequence[Demonstration]) -> optuna.Study:
    """Open or create the study of a folder; raise an error if it belongs to another search."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(folder / STUDY_NAME)))
    sampler = optuna.samplers.TPESampler(seed=config.seed, n_startup_trials=16)
    study = optuna.create_study(
        study_name="sealign",
        storage=storage,
        direction="maximize",
        sampler=sampler,
        pruner=optuna.pruners.PercentilePruner(75.0, n_startup_trials=6),
        load_if_exists=True,
    )
    if study.trials:
        sampler.reseed_rng()  # or a continued study would repeat its first draws
    about = config.replace(trials=1, minutes=None).dump()
    key = json.dumps([type(config.fit).__name__, about, demonstrations_hash(demonstrations)], sort_keys=True)
    if study.user_attrs.get("about", key) != key:
        raise SettingError(f"'{folder}' has the study of a search with other settings; choose another --output")
    study.set_user_attr("about", key)
    return study


@dataclass
class _Search:
    """Data used by all trials: activations, items, and the scores and losses of the base model."""

    model: Any
    tokenizer: Any
    demonstrations: Sequence[Demonstration]
    config: TuneConfig
    manager: Any
    folder: Path
    track: Track
    activations: dict[str, Activations] = field(default_factory=dict)

    def __post_init__(self) -> None:
        texts = bundled_texts()
        self.development_texts, self.test_texts = texts[::2], texts[1::2]
        self.tokens, self.base_losses = text_losses(self.model, self.tokenizer, self.development_texts)
        self.space = SearchSpace.of(self.model, self.config.fit, deployable=self.config.deployable)
        items = {task: self._item_numbers(task) for task in self.config.tasks}
        fraction = self.config.development_fraction
        cuts = {task: max(1, min(len(numbers) - 1, round(fraction * len(numbers)))) for task, numbers in items.items()}
        self.chunks = [
            {task: numbers[: cuts[task]][part::CHUNKS] for task, numbers in items.items()} for part in range(CHUNKS)
        ]
        self.test_items = {task: sorted(numbers[cuts[task] :]) for task, numbers in items.items()}
        self.base = [self._score_chunk(chunk, None) for chunk in self.chunks]

    def _item_numbers(self, task: str) -> list[int]:
        """Return the numbers of the items of a task, shuffled."""
        docs = self.manager.load([task])["tasks"][task].eval_docs
        count = len(docs) if self.config.limit is None else min(len(docs), self.config.limit)
        numbers = list(range(count))
        random.Random(f"{self.config.seed} {task}").shuffle(numbers)
        if count < 2 * CHUNKS:
            raise SettingError(
                f"task '{task}' has {count} items, but tuning needs at least {2 * CHUNKS}; use more items"
            )
        return numbers

    def _score_chunk(self, chunk: Mapping[str, list[int]], edit: Edit | None) -> dict[str, ItemScores]:
        """Return the first headline metric of each task on some items."""
        lm = SealignLM(self.model, edit=edit, tokenizer=self.tokenizer)
        found = {}
        try:
            for task, numbers in chunk.items():
                if numbers:
                    scores = run_task(lm, task, self.manager, items=numbers).scores()
                    found[task] = scores[headline_metrics(task, scores)[0]]
        finally:
            lm.close()
        return found

    def run(self, study: optuna.Study) -> None:
        """Run trials until their number or the time is used up."""
        started = time.monotonic()
        left = self.config.trials - sum(trial.state.is_finished() for trial in study.trials)
        for _ in self.track(range(max(0, left)), "Running trials", max(0, left)):
            if self.config.minutes is not None and time.monotonic() - started > 60 * self.config.minutes:
                break
            # Settings that leave nothing to decompose fail the trial, not the search.
            study.optimize(self._objective, n_trials=1, catch=(DegenerateError,))

    def _objective(self, trial: optuna.Trial) -> float:
        config, fraction = self.space.draw(trial, self.config.fit)
        full = self.edit(config)
        strength, damage, bound = self._strength(full, fraction * self.config.max_damage)
        trial.set_user_attr("strength", strength)
        trial.set_user_attr("damage", damage)
        trial.set_user_attr("damage_bound", bound)
        trial.set_user_attr("settings", config.dump())
        trial.set_constraint("damage over budget", bound - self.config.max_damage)
        edited: list[dict[str, ItemScores]] = []
        for part, chunk in enumerate(self.chunks):
            edited.append(self._score_chunk(chunk, full.with_strength(strength)))
            mean = mean_gain(self.base[: part + 1], edited)
            trial.set_user_attr("gain", mean)
            trial.report(mean, part)
            if trial.should_prune():
                raise optuna.TrialPruned
        return mean

    def _strength(self, edit: Edit, target: float) -> tuple[float, float, float]:
        """Return a strength whose damage bound is close to a target but not above it, the damage, and its bound."""
        strength, best = 1.0, (0.0, 0.0, 0.0)
        for _ in range(6):
            with apply_edit(self.model, edit, strength=strength):
                _, losses = text_losses(self.model, self.tokenizer, self.development_texts)
            damage, bound = increase_with_bound(self.tokens, self.base_losses, losses)
            if bound <= target and strength > best[0]:
                best = (strength, damage, bound)
                if strength >= 1.0 or bound > 0.7 * target:
                    break
            # A step aims a little below the target, since it would often end just above it.
            ratio = 0.9 * target / bound if bound > 0 else 4.0
            strength = min(1.0, strength * math.sqrt(min(4.0, max(1e-4, ratio))))
        return best

    def test(self, edit: Edit, command: str) -> Results:
        """Evaluate the winning edit, with all controls, on the items and texts that the search did not use."""
        config = EvaluationConfig(
            tasks=self.config.tasks,
            data_dir=self.config.data_dir,
            items=self.test_items,
            neutral_texts=self.test_texts,
        )
        return evaluate(
            self.model,
            self.tokenizer,
            {WINNER: edit},
            config=config,
            output=self.folder / "evaluation",
            sources={WINNER: str(self.folder / "edit")},
            command=command,
            track=self.track,
        )

    def edit(self, config: TunedConfig) -> Edit:
        """Return the edit of a configuration, from activations that are collected once per site."""
        site = config.read_site
        if site not in self.activations:
            self.activations[site] = collect_activations(
                self.model,
                self.tokenizer,
                self.demonstrations,
                site=site,
                config=config.collect_config(),
                checkpoint_dir=self.folder / "checkpoints",
                track=self.track,
            )
        return fit_edit_from_activations(
            self.model, self.tokenizer, self.activations[site], self.demonstrations, config=config
        )


def mean_gain(base: Sequence[Mapping[str, ItemScores]], edited: Sequence[Mapping[str, ItemScores]]) -> float:
    """Return the mean over tasks of how much better the edited score is than the base score.

    Args:
        base: For each part of the items, the scores of the base model by task.
        edited: For the same parts, the scores of the edited model.
    """
    gains = []
    for task in sorted({task for part in base for task in part}):
        before, after = (join_scores([part[task] for part in parts if task in part]) for parts in (base, edited))
        gains.append(gain(before.value, after.value, before.aim))
    return float(np.mean(gains))
