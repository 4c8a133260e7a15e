"""Tasks of lm-evaluation-harness by name, with data from the Hub or from local files in the schemas of the Hub."""

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

from sealign.errors import SettingError, first_sentence, unknown_name
from sealign.hub import hub_access

_CHOICE = {"validation": "truthful_qa/multiple_choice/validation.jsonl"}


@dataclass(frozen=True)
class LocalTask:
    """A task that can read local data.

    Attributes:
        config: Path of its configuration, relative to the harness's folder of tasks or to Sealign's.
        files: Mapping from split to the path of its file, relative to the data folder.
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
    # In the harness a group of tasks; on local data one task, from the template of the members.
    "mmlu": LocalTask("mmlu/default/_default_template_yaml", {"dev": "mmlu/dev.jsonl", "test": "mmlu/test.jsonl"}),
    "commonsense_qa": LocalTask("commonsense_qa/default.yaml", {"validation": "commonsense_qa/validation.jsonl"}),
    "hellaswag": LocalTask("hellaswag/hellaswag.yaml", {"validation": "hellaswag/validation.jsonl"}),
    "gsm8k": LocalTask("gsm8k/gsm8k.yaml", {"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"}),
    # Every question has the eight worked examples of the chain-of-thought paper.
    "gsm8k_cot": LocalTask("gsm8k/gsm8k-cot.yaml", {"test": "gsm8k/test.jsonl"}),
    "mathqa": LocalTask("mathqa/mathqa.yaml", {"test": "mathqa/test.jsonl"}),
    "nq_open": LocalTask("nq_open/nq_open.yaml", {"validation": "nq_open/validation.jsonl"}),
    "toxigen": LocalTask("toxigen/toxigen.yaml", {"test": "toxigen/test.jsonl"}),
}
"""Tasks that can read local data, by name."""


@contextmanager
def task_manager(tasks: Sequence[str], data_dir: str | Path | None = None) -> Iterator[TaskManager]:
    """Yield a task manager of the harness that knows the given tasks.

    Prompts, choices and metrics come from the harness; a data folder changes only the source of the rows.

    Args:
        tasks: Names of tasks of the harness, or ``halueval_qa``, which the harness does not have.
        data_dir: Folder with the files of ``LOCAL_TASKS`` in the schemas of the Hub; None loads data from the Hub.

    Raises:
        SettingError: A task is unknown (the nearest name is suggested), cannot read local data, or its file is missing.
    """
    # Reading the index of all tasks takes seconds, and local tasks do not need it.
    if not tasks:
        yield TaskManager(include_defaults=False)
        return
    known = None if data_dir is not None and set(tasks) <= set(LOCAL_TASKS) else _known_tasks()
    for name in tasks:
        if known is not None and name not in known.all_tasks:
            raise SettingError(unknown_name("task", name, LOCAL_TASKS) + ", or any task of lm-evaluation-harness")
    if data_dir is None:
        assert known is not None
        with hub_access():
            yield known
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in tasks:
            config = _local_config(name, Path(data_dir))
            (Path(folder) / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        yield TaskManager(include_path=folder, include_defaults=False)


def load_task(manager: TaskManager, task: str) -> dict[str, Any]:
    """Return a task or group as the harness loads it, with its data.

    Args:
        manager: Task manager that knows the task.
        task: Name of the task or group.

    Raises:
        SettingError: The data cannot be loaded.
    """
    try:
        found: dict[str, Any] = manager.load([task])
    except Exception as error:  # the Hub client and the harness raise many unrelated types
        raise SettingError(
            f"the data of task '{task}' cannot be loaded ({type(error).__name__}: {first_sentence(error)}); check the "
            "network, or give a local folder with data_dir (--data-dir)"
        ) from error
    return found


@functools.cache
def _known_tasks() -> TaskManager:
    """Return a manager of all tasks of the harness and of Sealign; reading their files takes seconds."""
    return TaskManager(include_path=str(files("sealign") / "evaluation" / "tasks"))


def _local_config(name: str, data_dir: Path) -> dict[str, Any]:
    """Return the configuration of a task that reads its splits from files."""
    if name not in LOCAL_TASKS:
        raise SettingError(
            f"task '{name}' cannot read local data; leave out --data-dir, or use one of: {', '.join(LOCAL_TASKS)}"
        )
    task = LOCAL_TASKS[name]
    paths = {split: (data_dir / file).resolve() for split, file in task.files.items()}
    for path in paths.values():
        if not path.is_file():
            raise SettingError(f"task '{name}' needs the file '{path}', which does not exist; check --data-dir")
    ours = Path(str(files("sealign") / "evaluation" / "tasks" / task.config))
    source = ours if ours.is_file() else Path(lm_eval.tasks.__file__).parent / task.config
    config = {
        "include": str(source),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in paths.items()}},
    }
    # The harness loads every split that a configuration names, even if nothing is taken from it.
    for split, key in (("train", "training_split"), ("validation", "validation_split")):
        if split not in paths:
            config[key] = None
    return config
