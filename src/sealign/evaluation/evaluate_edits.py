"""Run an evaluation: the base model, edits and their controls, on the same items."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from sealign.edits.edit import Edit
from sealign.edits.record import model_record
from sealign.errors import ResultsFileError, SettingError
from sealign.evaluation.damage import measure_damages
from sealign.evaluation.harness import SealignLM
from sealign.evaluation.item_scores import ItemScores, headline_metrics
from sealign.evaluation.journal import Journal
from sealign.evaluation.judge import JUDGED_TASK, NOT_JUDGED, Judge, judge_answers
from sealign.evaluation.local_tasks import task_manager
from sealign.evaluation.results import BASE, RESULTS_NAME, Arm, DamageRecord, Metric, Results, Scores, Task
from sealign.evaluation.rouge import without_resampling
from sealign.evaluation.samples import TaskSamples
from sealign.methods.registry import Change, describe_change, fit_seconds, randomized, reversed_roles
from sealign.models.fingerprint import weights_digest
from sealign.progress import Track, no_progress
from sealign.versions import library_versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


FEW_SHOT_SEED = 1234
"""Of the few-shot examples; the harness's own."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated.

    Attributes:
        tasks: names of lm-evaluation-harness, or ``halueval_qa``; at least 1.
        data_dir: a folder with the tasks' data in the Hub's schemas; the Hub if None.
        limit: the first so many items of each task; all if None.
        items: by task, the numbers of the items to score, in place of ``limit``.
        neutral_texts: on which damage is measured; the bundled ones if None.
        control_seeds: of the random directions, one control each; empty for none.
        reversed_control: whether the edit with its roles swapped is run too.
        preamble: text before every prompt, in every arm.
        max_new_tokens: by task, the length of an answer at most, in place of the task's own.
        batch_size: sequences run together where scoring is not packed, and in generation.
        judge: judges the answers of ``truthfulqa_gen``; None leaves Truth and Info out and says so.

    Raises:
        SettingError: no task, one twice, or a number below its bound.
    """

    tasks: Sequence[str]
    data_dir: Path | None = None
    limit: int | None = None
    items: Mapping[str, Sequence[int]] | None = None
    neutral_texts: Sequence[str] | None = None
    control_seeds: Sequence[int] = (0, 1, 2)
    reversed_control: bool = True
    preamble: str = ""
    max_new_tokens: Mapping[str, int] | None = None
    batch_size: int = 8
    judge: Judge | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise SettingError("no tasks are named, but an evaluation needs at least 1, such as truthfulqa_mc2")
        for kind, values in (("task", self.tasks), ("control seed", self.control_seeds)):
            twice = [value for value in values if list(values).count(value) > 1]
            if twice:
                raise SettingError(f"{kind} '{twice[0]}' is named {list(values).count(twice[0])} times; name it once")
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name} is {value}, but it must be at least 1")


@dataclass(frozen=True)
class _Arm:
    record: Arm
    edit: Change | None


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Mapping[str, Change],
    *,
    config: EvaluationConfig,
    output: str | Path,
    sources: Mapping[str, str] | None = None,
    command: str = "",
    ignore_mismatch: bool = False,
    journal: str | Path | None = None,
    track: Track = no_progress,
) -> Results:
    """Score the base model, each edit and each edit's controls on tasks, and write ``results.json``.

    What is scored is kept in the folder ``journal`` of the output as it comes: the same call continues where a killed
    one stopped, and loses at most one batch.

    Args:
        model: the base model.
        tokenizer: its own.
        edits: by name, edits and the methods that they are compared with.
        config: what is evaluated.
        output: the folder to write to.
        sources: by name, where each edit came from, for the record.
        command: that makes the results again, for the record.
        ignore_mismatch: as for ``attach``.
        journal: a folder in place of the output's own, so that several evaluations score once what they share.
        track: shows progress.

    Raises:
        SettingError: an unknown task or a missing file; or an edit is called as an arm that is not it.
        ResultsFileError: the folder has results with other settings.
    """
    arms = _arms(edits, sources or {}, config)
    settings = _settings(config)
    record = model_record(model, tokenizer)
    folder = Path(output)
    _check_output(folder, settings, [arm.record.hash for arm in arms.values()])
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "journal" if journal is None else Path(journal)
    digest = Journal.key(weights_digest(model).hex(), record.tokenizer_hash)
    tasks: dict[str, Task] = {}
    docs: dict[str, list[Any]] = {}
    with task_manager(config.tasks, config.data_dir) as manager:
        for name, arm in arms.items():
            lm = SealignLM(
                model,
                edit=arm.edit,
                preamble=config.preamble,
                tokenizer=tokenizer,
                journal=kept / f"{Journal.key(digest, arm.record.hash)}.jsonl",
                batch_size=config.batch_size,
                ignore_mismatch=ignore_mismatch,
                track=_naming(track, name),
            )
            try:
                for task in config.tasks:
                    started = time.perf_counter()
                    chosen = None if config.items is None else config.items[task]
                    longest = (config.max_new_tokens or {}).get(task)
                    samples = run_task(lm, task, manager, limit=config.limit, items=chosen, max_new_tokens=longest)
                    _add(tasks, task, name, samples)
                    docs[task] = samples.docs if task == JUDGED_TASK else []
                    arm.record.seconds[task] = round(time.perf_counter() - started, 3)
            finally:
                lm.close()
    if JUDGED_TASK in tasks:
        tasks[JUDGED_TASK] = _judge(tasks[JUDGED_TASK], docs[JUDGED_TASK], config.judge, kept, track)
    measured = Journal(kept / f"{digest}-damage.jsonl")
    damage = _damage(model, tokenizer, arms, config.neutral_texts, measured, track)
    results = Results(
        command=command,
        settings=settings,
        model=record,
        versions=library_versions("lm_eval", "datasets", "scipy", "numpy"),
        arms={name: arm.record for name, arm in arms.items()},
        tasks=tasks,
        damage=damage,
    )
    results.save(folder)
    return results


def _naming(track: Track, arm: str) -> Track:
    return lambda items, what, how_many: track(items, f"{what}: {arm}", how_many)


def _settings(config: EvaluationConfig) -> dict[str, Any]:
    settings = dataclasses.asdict(dataclasses.replace(config, judge=None))
    settings["judge"] = None if config.judge is None else config.judge.name
    if config.neutral_texts is not None:
        settings["neutral_texts"] = Journal.key(list(config.neutral_texts))
    settings["data_dir"] = None if config.data_dir is None else str(config.data_dir)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def _arms(edits: Mapping[str, Change], sources: Mapping[str, str], config: EvaluationConfig) -> dict[str, _Arm]:
    """The base model, then each edit with its controls."""
    arms = {BASE: _Arm(Arm("base", None, None, None, None, None, [], {}), None)}

    def add(name: str, kind: Any, of: str, edit: Change, source: str | None = None, seed: Any = None) -> None:
        if name in arms:
            raise SettingError(f"an edit is called '{name}', which is the name of another arm; choose another name")
        arms[name] = _Arm(_record(kind, of, edit, source, seed), edit)

    for name, edit in edits.items():
        add(name, "edit", name, edit, sources.get(name))
        for seed in config.control_seeds:
            if (control := randomized(edit, seed)) is not None:
                add(f"{name} random {seed}", "random", name, control, seed=seed)
        if config.reversed_control and (control := reversed_roles(edit)) is not None:
            add(f"{name} reversed", "reversed", name, control)
    return arms


def _record(kind: Any, of: str, edit: Change, source: str | None, seed: int | None) -> Arm:
    if isinstance(edit, Edit):
        return Arm(kind, of, source, edit.hash, seed, edit.settings, edit.layers, {})
    seconds = fit_seconds(edit) if kind == "edit" else None
    return Arm(kind, of, source, edit.hash, seed, None, [], {}, describe_change(edit), seconds)


def _check_output(folder: Path, settings: dict[str, Any], hashes: Sequence[str | None]) -> None:
    """Raise where a folder has results that are not those to be made."""
    if not (folder / RESULTS_NAME).is_file():
        return
    found = Results.load(folder)
    if found.settings != settings or [arm.hash for arm in found.arms.values()] != list(hashes):
        raise ResultsFileError(
            f"'{folder}' has the results of another evaluation, with other edits or settings; choose another --output"
        )


def run_task(
    lm: SealignLM,
    task: str,
    manager: TaskManager,
    *,
    limit: int | None = None,
    items: Sequence[int] | None = None,
    max_new_tokens: int | None = None,
) -> TaskSamples:
    """Return what a model made of a task: of its first ``limit`` items, of those numbered, or of all."""
    # What ``simple_evaluate`` does, without its search for a git repository and for the machine's details.
    loaded = manager.load([task])
    for loaded_task in loaded["tasks"].values():
        if loaded_task.get_config("num_fewshot") is None:
            loaded_task.set_config(key="num_fewshot", value=0)
        loaded_task.set_fewshot_seed(seed=FEW_SHOT_SEED)
        if max_new_tokens is not None:
            loaded_task.set_config(key="generation_kwargs", value={"max_gen_toks": max_new_tokens}, update=True)
    # The harness divides by probabilities that underflow where a model is broken; ``item_scores`` does not.
    with np.errstate(divide="ignore", invalid="ignore"), without_resampling():
        found = evaluator.evaluate(
            lm=lm,
            task_dict=loaded,
            limit=limit,
            samples=None if items is None else {task: list(items)},
            bootstrap_iters=0,
            log_samples=True,
        )
    return TaskSamples.of(task, found)


def _add(tasks: dict[str, Task], name: str, arm: str, found: TaskSamples) -> None:
    """Put what one arm made of a task into the tasks."""
    if name not in tasks:
        tasks[name] = Task(found.version, found.questions, found.groups, {}, {}, [])
    tasks[name].answers[arm] = found.answers
    scores = found.scores()
    headlines = headline_metrics(name, scores)
    for metric, values in scores.items():
        _add_scores(tasks[name], metric, arm, values, headline=metric in headlines)


def _add_scores(task: Task, metric: str, arm: str, values: ItemScores, *, headline: bool) -> None:
    """Put one metric of one arm into a task."""
    if metric not in task.metrics:
        task.metrics[metric] = Metric(values.items.tolist(), values.aim, values.scale, values.offset, headline, {})
    below = None if values.denominators is None else values.denominators.tolist()
    task.metrics[metric].arms[arm] = Scores(values.numerators.tolist(), below)


def _judge(task: Task, docs: Sequence[Any], judge: Judge | None, kept: Path, track: Track) -> Task:
    if judge is None:
        return dataclasses.replace(task, notes=[*task.notes, NOT_JUDGED])
    for metric in task.metrics:
        task.metrics[metric] = dataclasses.replace(task.metrics[metric], headline=False)
    journal = Journal(kept / f"{Journal.key(judge.name)}-judge.jsonl")
    for arm, answers in task.answers.items():
        judged = judge_answers(judge, docs, answers, journal=journal, track=track)
        for metric, values in judged.items():
            scores = ItemScores(np.arange(len(values)), np.array(values))
            _add_scores(task, metric, arm, scores, headline=True)
    return task


def _damage(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arms: Mapping[str, _Arm],
    texts: Sequence[str] | None,
    journal: Journal,
    track: Track,
) -> dict[str, DamageRecord]:
    edits = {name: arm.edit for name, arm in arms.items() if arm.edit is not None}
    damages = measure_damages(model, tokenizer, list(edits.values()), texts=texts, journal=journal, track=track)
    return {name: DamageRecord.of(damage) for name, damage in zip(edits, damages, strict=True)}
