"""Find an edit: scan many candidates, measure the best at full strength, and test the winner once."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sealign.demonstrations.demonstration import Demonstration
from sealign.demonstrations.splits import split_demonstrations
from sealign.edits.attach import apply_edit
from sealign.edits.edit import Edit
from sealign.errors import SettingError
from sealign.evaluation.candidates import candidate_configs, fit_candidates
from sealign.evaluation.comparison import EditReport, report_edits
from sealign.evaluation.damage import bundled_texts
from sealign.evaluation.evaluate_edits import evaluate
from sealign.evaluation.evaluation_config import EvaluationConfig
from sealign.evaluation.finalists import Finalist, choose_finalists
from sealign.evaluation.harness import SealignLM
from sealign.evaluation.harness_run import run_task
from sealign.evaluation.item_scores import headline_metrics
from sealign.evaluation.local_tasks import task_manager
from sealign.evaluation.preference import preference_scores
from sealign.evaluation.results import Results
from sealign.evaluation.scan import ScannedCandidate, scan, scan_csv
from sealign.evaluation.statistics import gain
from sealign.evaluation.strength_choice import DamageBudget, DamageTexts, choose_strength
from sealign.evaluation.tuning_config import TuneConfig
from sealign.evaluation.unseen import item_prompts
from sealign.files import check_file, write_bytes
from sealign.folders import check_unmarked
from sealign.methods.registry import fit_edit
from sealign.models.sites import select_layers
from sealign.models.structure import text_config, unwrap_model
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINNER = "winner"
"""Name of the winning edit in the results."""

SCAN_NAME = "scan.csv"
"""File name of the scan, which is written first."""

EDIT_NAME, EVALUATION_NAME, FIGURES_NAME = "edit", "evaluation", "figures"
"""Names of the other outputs."""


@dataclass(frozen=True)
class TuneResult:
    """The result of tuning.

    Attributes:
        scanned: All candidates, the most efficient first.
        finalists: Those that were measured at about full strength, the best first.
        winner: The finalist with the largest gain for its damage on the development part; None if none has a gain.
        edit: Edit of the winner, fitted on all demonstrations but those of the test.
        results: Results of this edit on the test part, with all controls.
        report: Statistics and verdict of these results.
    """

    scanned: list[ScannedCandidate]
    finalists: list[Finalist]
    winner: Finalist | None = None
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
    overwrite: bool = False,
    command: str = "",
    track: Track = no_progress,
) -> TuneResult:
    """Find the edit of the largest gain within a damage budget, and test it once on what the search did not use.

    The demonstrations are split by prompt into three parts. Every method is fitted on the first, at every site, layer
    and token choice. A scan ranks all these candidates by their efficiency on the second, the development part. The
    most efficient ones are measured on the development part at about the strength that uses the damage budget. The
    winner is fitted again on both parts, and tested on the third part and on other neutral texts, with random and
    reversed controls.

    Args:
        model: The base model; it must be differentiable.
        tokenizer: Tokenizer of the model.
        demonstrations: Demonstrations of at least 8 prompts.
        config: Settings of the search.
        output: Folder to write to: ``scan.csv``, ``edit`` and ``evaluation``.
        overwrite: Whether to replace the outputs of an earlier search.
        command: Command line that computes the results again, for the record.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.

    Raises:
        SettingError: A setting is out of range, or no candidate is left.
        EditFileError: The folder has the outputs of an earlier search and ``overwrite`` is False, or other files with
            their names.
        DemonstrationError, ActivationError: As for ``fit_edit``.
    """
    check_outputs(Path(output), overwrite=overwrite)
    search = _Search(model, tokenizer, demonstrations, config, Path(output), track)
    scanned = search.scan()
    write_bytes(search.folder / SCAN_NAME, scan_csv(scanned).encode())
    finalists = search.measure(scanned)
    if not finalists or not finalists[0].gain > 0:
        for name in (EDIT_NAME, EVALUATION_NAME):  # of an earlier search
            shutil.rmtree(search.folder / name, ignore_errors=True)
        return TuneResult(scanned, finalists)
    winner = finalists[0]
    edit = search.fit_winner(winner)
    edit.save_pretrained(search.folder / EDIT_NAME, overwrite=True)
    results = search.test(edit, command)
    (report,) = report_edits(results, max_damage=config.max_damage, seed=config.seed)
    return TuneResult(scanned, finalists, winner, edit, results, report)


def check_outputs(folder: Path, *, overwrite: bool = False) -> None:
    """Raise an error if the outputs of a search must not be written to a folder, before anything slow starts.

    Args:
        folder: Output folder of the search.
        overwrite: Whether to replace the outputs of an earlier search.

    Raises:
        EditFileError: The folder has the outputs of an earlier search and ``overwrite`` is False, or other files with
            their names.
    """
    check_unmarked(folder, [EDIT_NAME, EVALUATION_NAME, FIGURES_NAME], mark=SCAN_NAME)
    check_file(folder / SCAN_NAME, overwrite=overwrite)


class _Search:
    """The parts of the demonstrations and of the neutral text, and the steps of the search."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        demonstrations: Sequence[Demonstration],
        config: TuneConfig,
        folder: Path,
        track: Track,
    ) -> None:
        self.model, self.tokenizer, self.config, self.folder, self.track = model, tokenizer, config, folder, track
        self.searched, self.tested = split_demonstrations(demonstrations, holdout=config.holdout, seed=config.seed)
        self.fitted, self.development = split_demonstrations(
            self.searched, holdout=config.development, seed=config.seed
        )
        smallest = min(len(part) for part in (self.fitted, self.development, self.tested))
        if smallest < 2:
            raise SettingError(
                f"{len(demonstrations)} demonstrations are split into {len(self.fitted)} to fit, "
                f"{len(self.development)} to compare and {len(self.tested)} to test, but each part needs at least 2; "
                "give more demonstrations"
            )
        texts = bundled_texts()
        self.test_texts = texts[1::2]
        self.texts = DamageTexts.of(
            model,
            tokenizer,
            self.development,
            texts=texts[::2],
            prompt_format=config.prompt_format,
            track=track,
        )
        self.budget = DamageBudget(config.max_damage, config.max_domain_damage)
        folder.mkdir(parents=True, exist_ok=True)

    def scan(self) -> list[ScannedCandidate]:
        """Fit all candidates, and rank them by their efficiency."""
        config = self.config
        layers = select_layers(config.layers, int(text_config(unwrap_model(self.model)).num_hidden_layers))
        families = [
            family.replace(prompt_format=config.prompt_format, seed=config.seed)
            for family in candidate_configs(
                config.methods, config.sites, config.tokens, layers, deployable=config.deployable
            )
        ]
        candidates = fit_candidates(
            self.model,
            self.tokenizer,
            self.fitted,
            families,
            checkpoint_dir=self.folder / "checkpoints",
            track=self.track,
        )
        if config.deployable:
            candidates = [candidate for candidate in candidates if candidate.is_lora]
        if not candidates:
            raise SettingError("no candidate is left; search more methods or sites, or without deployable")
        return scan(
            self.model,
            self.tokenizer,
            candidates,
            self.development,
            self.texts,
            prompt_format=config.prompt_format,
            seed=config.seed,
            track=self.track,
        )

    def measure(self, scanned: Sequence[ScannedCandidate]) -> list[Finalist]:
        """Return the most efficient candidates with their gain and damage, the largest gain for its damage first."""
        chosen = choose_finalists(scanned, self.config.finalists)
        strengths = [each.strength_at(0.8 * self.config.max_damage) for each in chosen]
        edits = [each.candidate.edit.with_strength(s) for each, s in zip(chosen, strengths, strict=True)]
        damages = self.texts.measure(self.model, self.tokenizer, edits, track=self.track)
        base = self._scores(None)
        finalists = []
        for number in self.track(range(len(chosen)), "Measuring finalists", len(chosen)):
            neutral, domain = damages[number]
            after = self._scores(edits[number])
            gains = [gain(first, second, aim) for (first, aim), (second, _) in zip(base, after, strict=True)]
            used = self.budget.used(neutral.mean_divergence, None if domain is None else domain.mean_divergence)
            finalists.append(Finalist(chosen[number], strengths[number], neutral, domain, used, gains))
        return sorted(finalists, key=lambda each: each.gain_at_budget, reverse=True)

    def _scores(self, edit: Edit | None) -> list[tuple[float, Any]]:
        """Return (score, aim) of each development demonstration, or of each task if there are tasks."""
        if not self.config.tasks:
            with apply_edit(self.model, edit) if edit is not None else nullcontext():
                scores = preference_scores(
                    self.model, self.tokenizer, self.development, prompt_format=self.config.prompt_format
                )
            return [(float(value), "higher") for value in scores["preference_margin"].numerators]
        lm = SealignLM(self.model, edit=edit, tokenizer=self.tokenizer)
        try:
            found = []
            with task_manager(self.config.tasks, self.config.data_dir) as manager:
                for task in self.config.tasks:
                    chosen = self._task_items(manager, task)[0]
                    metrics = run_task(lm, task, manager, items={task: chosen}).scores()
                    metric = metrics[headline_metrics(task, metrics)[0]]
                    found.append((metric.value, metric.aim))
            return found
        finally:
            lm.close()

    def _task_items(self, manager: Any, task: str) -> tuple[list[int], list[int]]:
        """Return the numbers of the development items and of the test items of a task.

        An item with the prompt of a demonstration goes with it, and is left out if the candidates were fitted on it.
        """
        items = [item_prompts(item) for item in manager.load([task])["tasks"][task].eval_docs][: self.config.limit]
        parts = [{item.prompt_hash for item in part} for part in (self.fitted, self.development, self.tested)]
        shared = [[number for number, prompts in enumerate(items) if prompts & part] for part in parts]
        taken = {number for numbers in shared for number in numbers}
        rest = [number for number in range(len(items)) if number not in taken]
        shuffled = np.random.default_rng(self.config.seed).permutation(rest).tolist()
        cut = round((1 - self.config.holdout) * len(rest))
        development, test = sorted(shared[1] + shuffled[:cut]), sorted(shared[2] + shuffled[cut:])
        if min(len(development), len(test)) < 2:
            raise SettingError(
                f"task '{task}' has {len(items)} items, of which {len(development)} can be compared and {len(test)} "
                "tested, but each part needs at least 2; use more items"
            )
        return development, test

    def fit_winner(self, winner: Finalist) -> Edit:
        """Fit the winner on all demonstrations but those of the test, and choose its strength again."""
        edit = fit_edit(
            self.model, self.tokenizer, self.searched, config=winner.scanned.candidate.config, track=self.track
        )
        assert isinstance(edit, Edit)
        start = winner.strength * math.sqrt(0.8 / winner.used)
        choice = choose_strength(
            self.model, self.tokenizer, edit, self.texts, budget=self.budget, start=start, track=self.track
        )
        return edit.with_strength(choice.strength)

    def test(self, edit: Edit, command: str) -> Results:
        """Evaluate an edit, with all controls, on what the search did not use."""
        items = None
        if self.config.tasks:
            with task_manager(self.config.tasks, self.config.data_dir) as manager:
                items = {task: self._task_items(manager, task)[1] for task in self.config.tasks}
        config = EvaluationConfig(
            tasks=self.config.tasks,
            data_dir=self.config.data_dir,
            items=items,
            demonstrations=self.tested,
            prompt_format=self.config.prompt_format,
            neutral_texts=self.test_texts,
        )
        return evaluate(
            self.model,
            self.tokenizer,
            {WINNER: edit},
            config=config,
            output=self.folder / EVALUATION_NAME,
            overwrite=True,
            sources={WINNER: str(self.folder / EDIT_NAME)},
            command=command,
            track=self.track,
        )
