"""Run an evaluation: the base model, edits and their controls, on the same items."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sealign.demonstrations.demonstration import Demonstration
from sealign.edits.intervention import Intervention
from sealign.edits.record import model_record
from sealign.errors import DemonstrationError, ResultsFileError, SettingError
from sealign.evaluation.arms import PlannedArm, plan_arms
from sealign.evaluation.damage import bundled_texts, measure_passages
from sealign.evaluation.evaluation_config import EvaluationConfig
from sealign.evaluation.harness import SealignLM
from sealign.evaluation.harness_run import run_task
from sealign.evaluation.item_scores import ItemScores, headline_metrics
from sealign.evaluation.journal import Journal
from sealign.evaluation.judge import JUDGED_TASK, NOT_JUDGED, Judge, judge_answers
from sealign.evaluation.local_tasks import task_manager
from sealign.evaluation.preference import HEADLINES, PREFERENCE, PREFERENCE_VERSION, length_note, preference_metrics
from sealign.evaluation.results import RESULTS_NAME, DamageRecord, Metric, Results, Scores, Task
from sealign.evaluation.samples import TaskSamples
from sealign.evaluation.unseen import fitted_prompts, unseen_items
from sealign.models.passages import Passage, answer_passages, completion_passages, text_passages
from sealign.models.prompt_format import PromptFormat
from sealign.models.weights import weights_digest
from sealign.progress import Track, no_progress
from sealign.versions import library_versions

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Mapping[str, Intervention],
    *,
    config: EvaluationConfig,
    output: str | Path,
    sources: Mapping[str, str] | None = None,
    command: str = "",
    ignore_mismatch: bool = False,
    overwrite: bool = False,
    journal: str | Path | None = None,
    track: Track = no_progress,
) -> Results:
    """Score the base model, each edit and its controls on tasks and demonstrations, and write ``results.json``.

    Scores are saved batch by batch in the folder ``journal`` of the output: after an interruption the same call
    continues and repeats at most one batch.

    Args:
        model: The base model.
        tokenizer: Tokenizer of the model.
        edits: Mapping from name to edit or other intervention.
        config: Settings of the evaluation.
        output: Folder to write to.
        sources: Mapping from name to the folder or repository of each edit, for the record.
        command: Command line that computes the results again, for the record.
        ignore_mismatch: Whether to accept a model with another fingerprint.
        overwrite: Whether to replace the results of an evaluation with other edits or settings.
        journal: Folder of the journal. Evaluations with the same journal score each sequence once. Default: a folder
            in the output folder.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.

    Raises:
        SettingError: A task is unknown, a file is missing, or an edit has the name of another arm.
        ResultsFileError: The folder has the results of an evaluation with other edits or settings, and ``overwrite`` is
            False.
    """
    arms = plan_arms(
        edits,
        control_seeds=config.control_seeds,
        reversed_control=config.reversed_control,
        sources=sources or {},
    )
    settings = _settings(config)
    record = model_record(model, tokenizer)
    folder = Path(output)
    if not overwrite:
        _check_output(folder, settings, [arm.record.hash for arm in arms.values()])
    kept = folder / "journal" if journal is None else Path(journal)
    versions = library_versions("lm_eval", "datasets", "scipy", "numpy")
    # Other versions may compute other scores, so they do not continue a journal.
    digest = Journal.key(weights_digest(model).hex(), record.tokenizer_hash, versions)
    tasks = _score_arms(model, tokenizer, arms, config, kept, digest, ignore_mismatch, track)
    measured = Journal(kept / f"{digest}-damage.jsonl")
    neutral = text_passages(tokenizer, bundled_texts() if config.neutral_texts is None else config.neutral_texts)
    answers = answer_passages(
        model, tokenizer, config.demonstrations or (), prompt_format=config.prompt_format, track=track
    )
    damage, domain_damage = (
        _damage(model, tokenizer, arms, passages, measured, ignore_mismatch, track) for passages in (neutral, answers)
    )
    results = Results(
        command=command,
        settings=settings,
        model=record,
        versions=versions,
        arms={name: arm.record for name, arm in arms.items()},
        tasks=tasks,
        damage=damage,
        domain_damage=domain_damage,
    )
    results.save(folder)
    return results


def _score_arms(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arms: Mapping[str, PlannedArm],
    config: EvaluationConfig,
    kept: Path,
    digest: str,
    ignore_mismatch: bool,
    track: Track,
) -> dict[str, Task]:
    """Return the scores of all arms, and note in the record of each arm how long each task took."""
    tasks: dict[str, Task] = {}
    docs: list[Any] = []
    fitted = fitted_prompts(arm.edit for arm in arms.values() if arm.edit is not None)
    chosen: dict[str, dict[str, list[int]]] = {}
    left_out: dict[str, int] = {}
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
                    if task not in chosen:
                        chosen[task], left_out[task] = _choose_items(manager, task, config, fitted)
                    longest = (config.max_new_tokens or {}).get(task)
                    samples = run_task(lm, task, manager, items=chosen[task], max_new_tokens=longest)
                    _add_samples(tasks, task, name, samples)
                    if task == JUDGED_TASK:
                        docs = samples.docs
                    arm.record.seconds[task] = round(time.perf_counter() - started, 3)
                if config.demonstrations:
                    started = time.perf_counter()
                    _add_preference(tasks, name, lm, config)
                    arm.record.seconds[PREFERENCE] = round(time.perf_counter() - started, 3)
            finally:
                lm.close()
    for task, count in left_out.items():
        if count:
            tasks[task].notes.append(f"{count} of its items were left out, since an edit was fitted on their prompts")
    if JUDGED_TASK in tasks:
        judged = kept / f"{Journal.key(config.judge and config.judge.name, digest)}-judge.jsonl"
        tasks[JUDGED_TASK] = _judge(tasks[JUDGED_TASK], docs, config.judge, Journal(judged), track)
    return tasks


def _choose_items(
    manager: TaskManager, task: str, config: EvaluationConfig, fitted: frozenset[str]
) -> tuple[dict[str, list[int]], int]:
    """Return the numbers of the items to score, by member of a group of tasks, and how many were left out.

    Items are left out if an edit was fitted on their prompts.
    """
    chosen, asked = {}, 0
    for name, member in manager.load([task])["tasks"].items():
        items = list(member.eval_docs)
        numbers = list(range(len(items)))[: config.limit] if config.items is None else list(config.items[task])
        unseen = set(unseen_items(items, fitted))
        chosen[name] = [number for number in numbers if number in unseen]
        asked += len(numbers)
    kept = sum(map(len, chosen.values()))
    if asked and not kept:
        raise SettingError(
            f"the edits were fitted on all {asked} items of task '{task}'; leave the task out, or fit with a holdout"
        )
    return chosen, asked - kept


def _naming(track: Track, arm: str) -> Track:
    return lambda items, what, how_many: track(items, f"{what}: {arm}", how_many)


def _settings(config: EvaluationConfig) -> dict[str, Any]:
    """Return the settings as JSON values; the neutral texts by their hash."""
    texts = config.neutral_texts
    return config.dump() | {"neutral_texts": None if texts is None else Journal.key(list(texts))}


def _check_output(folder: Path, settings: dict[str, Any], hashes: Sequence[str | None]) -> None:
    """Raise an error if a folder has the results of another evaluation."""
    if not (folder / RESULTS_NAME).is_file():
        return
    found = Results.load(folder)
    if found.settings != settings or [arm.hash for arm in found.arms.values()] != list(hashes):
        raise ResultsFileError(
            f"'{folder}' has the results of an evaluation with other edits or settings, which are replaced only with "
            "--overwrite (overwrite=True in Python); add it, or choose another --output"
        )


def _add_samples(tasks: dict[str, Task], name: str, arm: str, found: TaskSamples) -> None:
    """Add the scores and answers of one arm on one task."""
    if name not in tasks:
        tasks[name] = Task(version=found.version, questions=found.questions, groups=found.groups)
    tasks[name].answers[arm] = found.answers
    scores = found.scores()
    headlines = headline_metrics(name, scores)
    for metric, values in scores.items():
        _add_scores(tasks[name], metric, arm, values, headline=metric in headlines)


def _add_preference(tasks: dict[str, Task], arm: str, lm: SealignLM, config: EvaluationConfig) -> None:
    """Add the preference of one arm for the positive completions of the demonstrations."""
    items = config.demonstrations or ()
    if PREFERENCE not in tasks:
        groups = [item.prompt_hash for item in items]
        tasks[PREFERENCE] = Task(
            version=PREFERENCE_VERSION,
            questions=[item.prompt for item in items],
            groups=groups if len(set(groups)) < len(groups) else None,
            notes=[note] if (note := length_note(lm.tokenizer, items)) else [],
        )
    scores = _preference(lm, items, config.prompt_format)
    margins = scores["preference_margin"].numerators
    tasks[PREFERENCE].answers[arm] = [
        item.positive if margin > 0 else item.negative for item, margin in zip(items, margins, strict=True)
    ]
    for metric, values in scores.items():
        _add_scores(tasks[PREFERENCE], metric, arm, values, headline=metric in HEADLINES)


def _preference(
    lm: SealignLM, demonstrations: Sequence[Demonstration], prompt_format: PromptFormat
) -> dict[str, ItemScores]:
    """Return the metrics of ``preference_scores``, with scores that the journal of the model keeps."""
    read = [dataclasses.replace(item, prompt=lm.prefix + item.prompt) for item in demonstrations]
    pairs = completion_passages(lm.tokenizer, read, prompt_format=prompt_format)
    passages = [passage for pair in pairs for passage in pair]
    for item, passage in zip([item for item in demonstrations for _ in range(2)], passages, strict=True):
        if len(passage.ids) > lm.max_length:
            raise DemonstrationError(
                f"the demonstration {item} is {len(passage.ids)} tokens long, but the context of the model is "
                f"{lm.max_length} tokens; shorten it or leave it out"
            )
    found = lm.score_tokens([(("", ""), list(p.ids[: p.start]), list(p.ids[p.start :])) for p in passages])
    return preference_metrics([value for value, _ in found], [passage.count for passage in passages])


def _add_scores(task: Task, metric: str, arm: str, values: ItemScores, *, headline: bool) -> None:
    """Add one metric of one arm to a task."""
    if metric not in task.metrics:
        task.metrics[metric] = Metric(
            items=values.items.tolist(),
            aim=values.aim,
            scale=values.scale,
            offset=values.offset,
            headline=headline,
        )
    task.metrics[metric].arms[arm] = Scores.of(values)


def _judge(task: Task, docs: Sequence[Any], judge: Judge | None, journal: Journal, track: Track) -> Task:
    """Return the task with the judgements of its answers as headline metrics, or with a note that there are none."""
    if judge is None:
        return dataclasses.replace(task, notes=[*task.notes, NOT_JUDGED])
    for metric in task.metrics:
        task.metrics[metric] = dataclasses.replace(task.metrics[metric], headline=False)
    for arm, answers in task.answers.items():
        judged = judge_answers(judge, docs, answers, journal=journal, track=track)
        for metric, values in judged.items():
            scores = ItemScores(np.arange(len(values)), np.array(values))
            _add_scores(task, metric, arm, scores, headline=True)
    return task


def _damage(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arms: Mapping[str, PlannedArm],
    passages: Sequence[Passage],
    journal: Journal,
    ignore_mismatch: bool,
    track: Track,
) -> dict[str, DamageRecord]:
    """Return the damage of all arms but the base model; nothing if there are fewer than 2 passages."""
    if len(passages) < 2:
        return {}
    edits = {name: arm.edit for name, arm in arms.items() if arm.edit is not None}
    damages = measure_passages(
        model,
        tokenizer,
        list(edits.values()),
        passages,
        journal=journal,
        ignore_mismatch=ignore_mismatch,
        track=track,
    )
    return {name: DamageRecord.of(damage) for name, damage in zip(edits, damages, strict=True)}
