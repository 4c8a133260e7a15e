"""Run an evaluation: the base model, edits and their controls, on the same items."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sealign.demonstrations.bundled import neutral_texts
from sealign.edits.intervention import Intervention
from sealign.errors import ResultsFileError, SettingError
from sealign.evaluation.answer_task import MAX_NEW_TOKENS, AnswerTask
from sealign.evaluation.arms import PlannedArm, plan_arms
from sealign.evaluation.damage import check_passages
from sealign.evaluation.engines import Engine, LocalEngine
from sealign.evaluation.evaluation_config import EvaluationConfig
from sealign.evaluation.format_remarks import add_format_remarks
from sealign.evaluation.harness import SealignLM
from sealign.evaluation.harness_run import run_task
from sealign.evaluation.item_scores import ItemScores, headline_metrics
from sealign.evaluation.journal import Journal
from sealign.evaluation.judge import JUDGED_TASK, NOT_JUDGED, Judge, judge_answers
from sealign.evaluation.judged_pairs import PairJudge
from sealign.evaluation.local_tasks import load_task, task_manager
from sealign.evaluation.preference import PREFERENCE
from sealign.evaluation.preference_task import add_preference
from sealign.evaluation.results import ANSWERS, BASE, RESULTS_NAME, DamageRecord, Results, Task
from sealign.evaluation.samples import TaskSamples
from sealign.evaluation.unseen import choose_items, fitted_prompts, seen_note
from sealign.models.passages import Passage, text_passages
from sealign.progress import Track, no_progress
from sealign.versions import library_versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


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
    engine: Engine | None = None,
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
        engine: Where the model runs; None for this process. With an engine of a server, ``model`` needs no weights.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.

    Raises:
        SettingError: A task is unknown, a file is missing, an edit has the name of another arm, or there are fewer than
            2 neutral texts.
        ResultsFileError: The folder has the results of an evaluation with other edits or settings, and ``overwrite`` is
            False.
    """
    arms = plan_arms(
        edits,
        control_seeds=config.control_seeds,
        reversed_control=config.reversed_control,
        sources=sources or {},
        strengths=config.strengths,
    )
    _check_prefixes(arms, config)
    neutral = text_passages(tokenizer, neutral_texts() if config.neutral_texts is None else config.neutral_texts)
    check_passages(neutral)
    settings = _settings(config)
    if engine is None:
        engine = LocalEngine(model, tokenizer, ignore_mismatch=ignore_mismatch)
    engine.check([arm.edit for arm in arms.values() if arm.edit is not None])
    record = engine.record
    folder = Path(output)
    if not overwrite:
        _check_output(folder, settings, [arm.record.hash for arm in arms.values()])
    kept = folder / "journal" if journal is None else Path(journal)
    versions = library_versions("lm_eval", "datasets", "scipy", "numpy")
    # Other versions may compute other scores, so they do not continue a journal.
    digest = Journal.key(engine.identity, record.tokenizer_hash, versions)
    scored = config.instructed()
    asked = AnswerTask(
        scored.prompts or (), scored.prompt_format, (config.max_new_tokens or {}).get(ANSWERS, MAX_NEW_TOKENS)
    )
    tasks = _score_arms(engine, arms, scored, asked, kept, digest, track)
    add_format_remarks(tasks, edits, tokenizer, config)
    if config.prompts and (note := seen_note(config.prompts, edits.values())):
        tasks[ANSWERS].notes.append(note)
    measured = Journal(kept / f"{digest}-damage.jsonl")
    answers = engine.own_answers(scored.demonstrations or (), scored.prompt_format, track)
    answered = {passage.ids[: passage.start] for passage in answers}
    answers += [passage for passage in asked.passages if passage.ids[: passage.start] not in answered]
    damage, domain_damage = (_damage(engine, arms, passages, measured, track) for passages in (neutral, answers))
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
    engine: Engine,
    arms: Mapping[str, PlannedArm],
    config: EvaluationConfig,
    asked: AnswerTask,
    kept: Path,
    digest: str,
    track: Track,
) -> dict[str, Task]:
    """Return the scores of all arms, and note in the record of each arm how long each task took."""
    tasks: dict[str, Task] = {}
    docs: list[Any] = []
    fitted = fitted_prompts(arm.edit for arm in arms.values() if arm.edit is not None)
    chosen: dict[str, dict[str, list[int]]] = {}
    left_out: dict[str, int] = {}
    loaded: dict[str, dict[str, Any]] = {}

    @contextmanager
    def attached(name: str) -> Iterator[SealignLM]:
        with engine.lm(
            arms[name].edit,
            preamble=config.preamble,
            journal=kept / f"{Journal.key(digest, arms[name].record.hash)}.jsonl",
            batch_size=config.batch_size,
            track=_naming(track, name),
            chat_template_args=dict(config.prompt_format.chat_template_kwargs),
            date=config.prompt_format.date,
        ) as lm:
            yield lm

    @contextmanager
    def timed(arm: str, task: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        arms[arm].record.seconds[task] = round(time.perf_counter() - started, 3)
        _log.info("scored %s on %s in %.1f s", arm, task, arms[arm].record.seconds[task])

    edits = [arm.edit for arm in arms.values() if arm.edit is not None]
    with task_manager(config.tasks, config.data_dir) as manager, engine.shared(edits):
        for name in arms:
            with attached(name) as lm:
                for task in config.tasks:
                    if task not in loaded:
                        loaded[task] = load_task(manager, task)
                        chosen[task], left_out[task] = choose_items(loaded[task], task, config, fitted)
                    with timed(name, task):
                        samples = _run(lm, task, loaded[task], config, chosen[task])
                        _add_samples(tasks, task, name, samples)
                    if task == JUDGED_TASK:
                        docs = samples.docs
                if config.demonstrations:
                    with timed(name, PREFERENCE):
                        add_preference(tasks, name, lm, config.demonstrations, config.prompt_format)
                if config.prompts:
                    with timed(name, ANSWERS):
                        asked.add_arm(name, lm)
    for task, count in left_out.items():
        if count:
            tasks[task].notes.append(f"{count} of its items were left out, since an edit was fitted on their prompts")
    judged = Journal(kept / f"{Journal.key(config.judge and config.judge.name, digest)}-judge.jsonl")
    if JUDGED_TASK in tasks:
        tasks[JUDGED_TASK] = _judge(tasks[JUDGED_TASK], docs, config.judge, judged, track)
    if config.prompts:
        with attached(BASE) as base:
            tasks[ANSWERS] = asked.measure(
                base,
                config.measures,
                config.aims,
                journal=Journal(kept / f"{digest}-answers.jsonl"),
                judge=None if config.judge is None else PairJudge(config.judge, config.criterion, judged),
                track=track,
            )
    return tasks


def _run(
    lm: SealignLM,
    task: str,
    loaded: Mapping[str, Any],
    config: EvaluationConfig,
    items: Mapping[str, Sequence[int]],
) -> TaskSamples:
    """Run one task of the harness with the settings of an evaluation."""
    return run_task(
        lm,
        task,
        loaded,
        items=items,
        max_new_tokens=(config.max_new_tokens or {}).get(task),
        num_fewshot=config.num_fewshot,
        apply_chat_template=config.apply_chat_template,
        system_instruction=config.system_instruction,
    )


def _check_prefixes(arms: Mapping[str, PlannedArm], config: EvaluationConfig) -> None:
    """Raise an error if the text of an intervention would stand before the chat template."""
    for name, arm in arms.items():
        if config.apply_chat_template and arm.edit is not None and arm.edit.prefix:
            raise SettingError(
                f"'{name}' puts text before every prompt, which would stand before the chat template; evaluate it "
                "without --apply-chat-template"
            )


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
        tasks[name].add_scores(metric, arm, values, headline=metric in headlines)


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
            task.add_scores(metric, arm, scores, headline=True)
    return task


def _damage(
    engine: Engine, arms: Mapping[str, PlannedArm], passages: Sequence[Passage], journal: Journal, track: Track
) -> dict[str, DamageRecord]:
    """Return the damage of all arms but the base model; nothing if there are fewer than 2 passages."""
    if len(passages) < 2:
        return {}
    edits = {name: arm.edit for name, arm in arms.items() if arm.edit is not None}
    damages = engine.damages(list(edits.values()), passages, journal, track)
    return {name: DamageRecord.of(damage) for name, damage in zip(edits, damages, strict=True)}
