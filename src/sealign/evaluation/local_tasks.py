"""Harness tasks by name, on the Hub's data or on local files in the Hub's schemas."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from lm_eval.tasks import TaskManager

from sealign.errors import SettingError, unknown_name

_CHOICE = {"validation": "truthful_qa/multiple_choice/validation.jsonl"}


@dataclass(frozen=True)
class LocalTask:
    """A task that reads local data.

    Attributes:
        config: its configuration, below the harness's folder of tasks, or below ours.
        files: by split, the file below a data folder.
    """

    config: str
    files: Mapping[str, str]


LOCAL_TASKS: Mapping[str, LocalTask] = {
    "truthfulqa_mc1": LocalTask("truthfulqa/truthfulqa_mc1.yaml", _CHOICE),
    "truthfulqa_mc2": LocalTask("truthfulqa/truthfulqa_mc2.yaml", _CHOICE),
    "truthfulqa_gen": LocalTask(
        "truthfulqa/truthfulqa_gen.yaml", {"validation": "truthful_qa/generation/validation.jsonl"}
    ),
    "halueval_qa": LocalTask("halueval_qa.yaml", {"data": "halueval_qa/train.jsonl"}),
    "bbq": LocalTask("bbq/bbq_multiple_choice.yaml", {"test": "bbq/test.jsonl"}),
    "crows_pairs_english": LocalTask("crows_pairs/crows_pairs_english.yaml", {"test": "crows_pairs/test.jsonl"}),
    # A group of the harness, which is one task on local data: the template of its members.
    "mmlu": LocalTask("mmlu/default/_default_template_yaml", {"dev": "mmlu/dev.jsonl", "test": "mmlu/test.jsonl"}),
    "commonsense_qa": LocalTask("commonsense_qa/default.yaml", {"validation": "commonsense_qa/validation.jsonl"}),
    "hellaswag": LocalTask("hellaswag/hellaswag.yaml", {"validation": "hellaswag/validation.jsonl"}),
    "gsm8k": LocalTask("gsm8k/gsm8k.yaml", {"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"}),
    # The eight worked examples of the chain-of-thought paper, the same for every question.
    "gsm8k_cot": LocalTask("gsm8k/gsm8k-cot.yaml", {"test": "gsm8k/test.jsonl"}),
    "mathqa": LocalTask("mathqa/mathqa.yaml", {"test": "mathqa/test.jsonl"}),
    "nq_open": LocalTask("nq_open/nq_open.yaml", {"validation": "nq_open/validation.jsonl"}),
    "toxigen": LocalTask("toxigen/toxigen.yaml", {"test": "toxigen/test.jsonl"}),
}
"""By name, the tasks that read local data."""


@contextmanager
def task_manager(tasks: Sequence[str], data_dir: str | Path | None = None) -> Iterator[TaskManager]:
    """Yield a task manager of the harness that knows the tasks, with local data where a folder is given.

    Prompts, choices and metrics are the harness's own; only where the rows come from is changed.

    Args:
        tasks: names of the harness, or ``halueval_qa``, which the harness lacks.
        data_dir: a folder with the files of ``LOCAL_TASKS`` in the Hub's schemas; the Hub if None.

    Raises:
        SettingError: a task is unknown (the nearest name is suggested), has no local schema, or its file is missing.
    """
    # The index of all tasks takes seconds to read, and local tasks do not need it.
    known = None if data_dir is not None and set(tasks) <= set(LOCAL_TASKS) else _known_tasks()
    for name in tasks:
        if known is not None and name not in known.all_tasks:
            raise SettingError(unknown_name("task", name, LOCAL_TASKS) + ", or any task of lm-evaluation-harness")
    if data_dir is None:
        assert known is not None
        yield known
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in tasks:
            config = _local_config(name, Path(data_dir))
            (Path(folder) / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        yield TaskManager(include_path=folder, include_defaults=False)


@functools.cache
def _known_tasks() -> TaskManager:
    """All tasks of the harness and ours; reading their files takes seconds."""
    return TaskManager(include_path=str(files("sealign") / "evaluation" / "tasks"))


def _local_config(name: str, data_dir: Path) -> dict[str, Any]:
    """The harness's configuration of a task, reading its splits from files."""
    if name not in LOCAL_TASKS:
        raise SettingError(
            f"task '{name}' cannot read local data; leave out --data-dir, or use one of: {', '.join(LOCAL_TASKS)}"
        )
    task = LOCAL_TASKS[name]
    paths = {split: (data_dir / file).resolve() for split, file in task.files.items()}
    for path in paths.values():
        if not path.is_file():
            raise SettingError(f"task '{name}' needs the file '{path}', which is not there; check --data-dir")
    ours = Path(str(files("sealign") / "evaluation" / "tasks" / task.config))
    source = ours if ours.is_file() else Path(lm_eval.tasks.__file__).parent / task.config
    config = {
        "include": str(source),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in paths.items()}},
    }
    # A split that a task names is loaded even where nothing is taken from it.
    for split, key in (("train", "training_split"), ("validation", "validation_split")):
        if split not in paths:
            config[key] = None
    return config
