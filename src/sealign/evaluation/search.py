"""Search: candidates are scanned, the best are measured, and the choice is tested on what the search did not use."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from sealign.demonstrations.bundled import neutral_texts
from sealign.demonstrations.demonstration import Demonstration
from sealign.demonstrations.prompts import prompts_of
from sealign.demonstrations.splits import split_demonstrations
from sealign.edits.attach import apply_edit
from sealign.edits.edit import Edit
from sealign.edits.strength import MAX_STRENGTH
from sealign.errors import SettingError
from sealign.evaluation.candidates import candidate_configs, collect_for_candidates
from sealign.evaluation.evaluate_edits import evaluate
from sealign.evaluation.evaluation_config import CONTROL_SEEDS, EvaluationConfig
from sealign.evaluation.finalists import Finalist, choose_finalists
from sealign.evaluation.harness import SealignLM
from sealign.evaluation.harness_run import run_task
from sealign.evaluation.item_scores import headline_metrics
from sealign.evaluation.journal import Journal
from sealign.evaluation.local_tasks import load_task, task_manager
from sealign.evaluation.preference import preference_scores
from sealign.evaluation.results import ANSWERS, Results
from sealign.evaluation.scan import ScannedCandidate, scan_csv
from sealign.evaluation.scan_rounds import OnRound, ignore_round, scan_rounds
from sealign.evaluation.statistics import gain
from sealign.evaluation.strength_choice import DamageBudget, DamageTexts, choose_strength
from sealign.evaluation.time_limit import MARGIN, TimeLimit, count_tokens, layer_rounds, seconds_per_token
from sealign.evaluation.tuning_config import TuneConfig
from sealign.evaluation.unseen import divide_items
from sealign.files import write_bytes
from sealign.methods.registry import fit_edit
from sealign.models.fingerprint import tokenizer_hash
from sealign.models.passages import completion_passages, text_passages
from sealign.models.sites import select_layers
from sealign.models.structure import text_config, unwrap_model
from sealign.models.weights import weights_digest
from sealign.progress import Track
from sealign.versions import library_versions

SCAN_NAME = "scan.csv"
"""File name of the scan, which is written first."""

CHECKPOINTS_NAME = "checkpoints"
"""Name of the folder of an unfinished search, from which the same call continues."""

EVALUATION_NAME = "evaluation"
"""Name of the folder of the test."""

ANSWERED = 10
"""Number of prompts of the test that the winner and its controls answer."""

ANSWER_TOKENS = 48
"""Maximum number of tokens of an answer in the test."""


class Search:
    """The steps of a search, on disjoint parts of the demonstrations and of the neutral text.

    Args:
        model: The base model; it must be differentiable.
        tokenizer: Tokenizer of the model.
        demonstrations: Demonstrations of at least 8 prompts.
        config: Settings of the search.
        folder: Folder to write to; created if it does not exist.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.
        on_round: Function of the candidates of each round of the scan.

    Attributes:
        fitted: Demonstrations to fit candidates on.
        development: Demonstrations to compare candidates on.
        searched: Both of them, on which the winner is fitted again.
        tested: Demonstrations of the final test.
        items: Mapping from task to the numbers of its development items and of its test items.
        left_out: Layers that the time limit left out of the scan.
    """

    folder: Path
    fitted: list[Demonstration]
    development: list[Demonstration]
    searched: list[Demonstration]
    tested: list[Demonstration]

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        demonstrations: Sequence[Demonstration],
        config: TuneConfig,
        folder: Path,
        track: Track,
        on_round: OnRound = ignore_round,
    ) -> None:
        self.limit: TimeLimit = TimeLimit(config.max_minutes)
        self._model, self._tokenizer, self._config, self.folder, self._track = model, tokenizer, config, folder, track
        self._on_round = on_round
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
        self.tasks: dict[str, dict[str, Any]] = {}
        if config.tasks:
            with task_manager(config.tasks, config.data_dir) as manager:
                self.tasks = {task: load_task(manager, task) for task in config.tasks}
        self.items: dict[str, tuple[list[int], list[int]]] = {task: self._divide_items(task) for task in self.tasks}
        texts = neutral_texts()
        self.test_texts: list[str] = texts[1::2]
        self.texts: DamageTexts = DamageTexts.of(
            model, tokenizer, self.development, texts=texts[::2], prompt_format=config.prompt_format, track=track
        )
        self.budget: DamageBudget = DamageBudget(config.max_damage, config.max_domain_damage)
        self.left_out: list[int] = []
        folder.mkdir(parents=True, exist_ok=True)
        # Damage and scores depend on all of this, beside what their keys hold.
        digest = Journal.key(weights_digest(model).hex(), tokenizer_hash(tokenizer), library_versions())
        self.journal: Journal = Journal(folder / CHECKPOINTS_NAME / f"{digest}.jsonl")

    def _divide_items(self, task: str) -> tuple[list[int], list[int]]:
        """Return the numbers of the development items and of the test items of a task."""
        items = list(self.tasks[task]["tasks"][task].eval_docs)[: self._config.limit]
        parts = (self.fitted, self.development, self.tested)
        return divide_items(task, items, parts, holdout=self._config.holdout, seed=self._config.seed)

    def scan(self) -> list[ScannedCandidate]:
        """Fit all candidates, rank them by their efficiency, and write them to the folder.

        With a time limit, layers are scanned in rounds, as many as leave enough time for the other steps.
        """
        config = self._config
        layers = select_layers(config.layers, int(text_config(unwrap_model(self._model)).num_hidden_layers))
        rounds, rest = [list(layers)], 0.0
        if config.max_minutes is not None:
            rounds = layer_rounds(layers)
            first, rest = self._estimates()
            self.limit.check(first + rest)
        found = candidate_configs(config.methods, config.sites, config.tokens, layers, deployable=config.deployable)
        families = [family.replace(prompt_format=config.prompt_format, seed=config.seed) for family in found]
        model, tokenizer, folder, track = self._model, self._tokenizer, self.folder / CHECKPOINTS_NAME, self._track
        collected = collect_for_candidates(model, tokenizer, self.fitted, families, checkpoint_dir=folder, track=track)
        scanned, self.left_out = scan_rounds(
            model,
            tokenizer,
            [[family.replace(layers=tuple(chosen)) for family in families] for chosen in rounds],
            collected,
            self.fitted,
            self.development,
            self.texts,
            limit=self.limit,
            rest=rest,
            deployable=config.deployable,
            prompt_format=config.prompt_format,
            seed=config.seed,
            checkpoint_dir=folder,
            on_round=self._on_round,
            track=track,
        )
        write_bytes(self.folder / SCAN_NAME, scan_csv(scanned).encode())
        return scanned

    def _estimates(self) -> tuple[float, float]:
        """Return how many seconds the first round of the scan takes, and everything after the scan."""
        config, form = self._config, self._config.prompt_format

        def tokens(demonstrations: Sequence[Demonstration]) -> int:
            pairs = completion_passages(self._tokenizer, demonstrations, prompt_format=form)
            return count_tokens([passage for pair in pairs for passage in pair])

        compared, fitted, tested = map(tokens, (self.development, self.fitted, self.tested))
        damage = count_tokens([*self.texts.neutral, *self.texts.answers])
        own_text = count_tokens(text_passages(self._tokenizer, self.test_texts))
        arms = 3 + len(CONTROL_SEEDS)  # base, edit, reversed
        scan = fitted + 3 * compared + 5 * damage  # a backward pass takes about as long as a forward pass
        later = (config.finalists + 1) * (compared + damage) + fitted + compared + 4 * damage
        later += arms * (tested + own_text + damage + 2 * ANSWERED * ANSWER_TOKENS)
        seconds = MARGIN * seconds_per_token(self._model, self._tokenizer, self.texts.neutral)
        scoring = 0.0
        if config.tasks:
            started = time.perf_counter()
            self._scores(None)
            shares = [len(test) / len(development) for development, test in self.items.values()]
            scoring = (time.perf_counter() - started) * (config.finalists + arms * max(shares))
        return seconds * scan, seconds * later + MARGIN * scoring

    def measure(self, scanned: Sequence[ScannedCandidate]) -> list[Finalist]:
        """Return the most efficient candidates with their gain and damage, the largest gain for its damage first."""
        chosen = choose_finalists(scanned, self._config.finalists, self._config.max_damage)
        strengths = [self.predicted_strength(each) for each in chosen]
        edits = [each.candidate.edit.with_strength(s) for each, s in zip(chosen, strengths, strict=True)]
        damages = self.texts.measure(self._model, self._tokenizer, edits, journal=self.journal, track=self._track)
        base = self._scores(None)
        finalists = []
        for number in self._track(range(len(chosen)), "Measuring finalists", len(chosen)):
            neutral, domain = damages[number]
            after = self._scores(edits[number])
            gains = [gain(first, second, aim) for (first, aim), (second, _) in zip(base, after, strict=True)]
            room = self.budget.room(neutral, domain)
            finalists.append(Finalist(chosen[number], strengths[number], neutral, domain, room, gains))
        return sorted(finalists, key=lambda each: each.gain_at_budget, reverse=True)

    def predicted_strength(self, scanned: ScannedCandidate) -> float:
        """Return the strength for which the scan predicts 80 % of the budget, at most the largest of the method."""
        predicted = scanned.strength_at(0.8 * self._config.max_damage)
        return min(predicted, scanned.candidate.config.max_strength, MAX_STRENGTH)

    def _scores(self, edit: Edit | None) -> list[tuple[float, Any]]:
        """Return (score, aim) of each development demonstration, or of each task if there are tasks."""
        compared = [item.hash for item in self.development]
        key = Journal.key("scores", edit and edit.hash, compared, self._config.dump())
        if key not in self.journal:
            self.journal.put({key: [list(each) for each in self._computed_scores(edit)]})
        return [(float(value), aim) for value, aim in self.journal.get(key)]

    def _computed_scores(self, edit: Edit | None) -> list[tuple[float, Any]]:
        if not self._config.tasks:
            with apply_edit(self._model, edit) if edit is not None else nullcontext():
                scores = preference_scores(
                    self._model, self._tokenizer, self.development, prompt_format=self._config.prompt_format
                )
            return [(float(value), "higher") for value in scores["preference_margin"].numerators]
        lm = SealignLM(self._model, edit=edit, tokenizer=self._tokenizer)
        try:
            found = []
            for task, (development, _) in self.items.items():
                metrics = run_task(lm, task, self.tasks[task], items={task: development}).scores()
                metric = metrics[headline_metrics(task, metrics)[0]]
                found.append((metric.value, metric.aim))
            return found
        finally:
            lm.close()

    def fit(self, scanned: ScannedCandidate, start: float) -> Edit:
        """Fit a candidate on all demonstrations but those of the test, and choose its strength within the budget.

        Args:
            scanned: The candidate.
            start: Strength to try first.
        """
        config = scanned.candidate.config
        edit = fit_edit(
            self._model,
            self._tokenizer,
            self.searched,
            config=config,
            checkpoint_dir=self.folder / CHECKPOINTS_NAME,
            track=self._track,
        )
        assert isinstance(edit, Edit)
        choice = choose_strength(
            self._model,
            self._tokenizer,
            edit,
            self.texts,
            budget=self.budget,
            start=start,
            limit=config.max_strength,
            journal=self.journal,
            track=self._track,
        )
        return edit.with_strength(choice.strength)

    def finish(self) -> None:
        """Remove what was kept for a search that goes on after an interruption."""
        shutil.rmtree(self.folder / CHECKPOINTS_NAME, ignore_errors=True)

    def test(
        self,
        edits: Mapping[str, Edit],
        sources: Mapping[str, str],
        *,
        command: str = "",
        control_seeds: Sequence[int] = CONTROL_SEEDS,
        answered: int = 0,
    ) -> Results:
        """Evaluate edits, with controls, on what the search did not use.

        Args:
            edits: Mapping from name to edit.
            sources: Mapping from name to the folder of the edit.
            command: Command line that computes the results again, for the record.
            control_seeds: Seeds of the random controls of each edit.
            answered: Number of prompts of the test part that every arm answers.
        """
        prompts = prompts_of(self.tested, answered)
        config = EvaluationConfig(
            tasks=self._config.tasks,
            data_dir=self._config.data_dir,
            items={task: test for task, (_, test) in self.items.items()} or None,
            demonstrations=self.tested,
            prompt_format=self._config.prompt_format,
            neutral_texts=self.test_texts,
            control_seeds=control_seeds,
            prompts=prompts if len(prompts) > 1 else None,
            max_new_tokens={ANSWERS: ANSWER_TOKENS},
        )
        return evaluate(
            self._model,
            self._tokenizer,
            edits,
            config=config,
            output=self.folder / EVALUATION_NAME,
            overwrite=True,
            sources=sources,
            command=command,
            track=self._track,
        )
