"""Harness tasks by name, on the Hub's data or on local files in the Hub's schemas."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from lm_eval.tasks import TaskManager

from sealign.errors import SettingError, unknown_name

_CHOICE, _GENERATION = "truthful_qa/multiple_choice/validation.jsonl", "truthful_qa/generation/validation.jsonl"

LOCAL_FILES: Mapping[str, Mapping[str, str]] = {
    "truthfulqa_mc1": {"validation": _CHOICE},
    "truthfulqa_mc2": {"validation": _CHOICE},
    "truthfulqa_gen": {"validation": _GENERATION},
    "halueval_qa": {"data": "halueval_qa/train.jsonl"},
    "bbq": {"test": "bbq/test.jsonl"},
    "crows_pairs_english": {"test": "crows_pairs/test.jsonl"},
    "mmlu": {"dev": "mmlu/dev.jsonl", "test": "mmlu/test.jsonl"},
    "commonsense_qa": {"validation": "commonsense_qa/validation.jsonl"},
    "hellaswag": {"validation": "hellaswag/validation.jsonl"},
    "gsm8k": {"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"},
    "mathqa": {"test": "mathqa/test.jsonl"},
    "nq_open": {"validation": "nq_open/validation.jsonl"},
    "toxigen": {"test": "toxigen/test.jsonl"},
}
"""By task, the file of each split below a data folder."""

_TEMPLATES = {"mmlu": "mmlu/default/_default_template_yaml"}
"""Groups of the harness that are one task on local data, and the template of their members."""


@contextmanager
def task_manager(tasks: Sequence[str], data_dir: str | Path | None = None) -> Iterator[TaskManager]:
    """Yield a task manager of the harness that knows the tasks, with local data where a folder is given.

    Prompts, choices and metrics are the harness's own; only where the rows come from is changed.

    Args:
        tasks: names of the harness, or ``halueval_qa``, which the harness lacks.
        data_dir: a folder with ``LOCAL_FILES`` in the Hub's schemas; the Hub if None.

    Raises:
        SettingError: a task is unknown (the nearest name is suggested), has no local schema, or its file is missing.
    """
    known = _known_tasks()
    for name in tasks:
        if name not in known.all_tasks:
            raise SettingError(unknown_name("task", name, LOCAL_FILES) + ", or any task of lm-evaluation-harness")
    if data_dir is None:
        yield known
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in tasks:
            config = _local_config(name, known, Path(data_dir))
            (Path(folder) / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        yield TaskManager(include_path=folder, include_defaults=False)


@functools.cache
def _known_tasks() -> TaskManager:
    """All tasks of the harness and ours; reading their files takes seconds."""
    return TaskManager(include_path=str(files("sealign") / "evaluation" / "tasks"))


def _local_config(name: str, known: TaskManager, data_dir: Path) -> dict[str, Any]:
    """The harness's configuration of a task, reading its splits from files."""
    if name not in LOCAL_FILES:
        raise SettingError(
            f"task '{name}' cannot read local data; leave out --data-dir, or use one of: {', '.join(LOCAL_FILES)}"
        )
    paths = {split: (data_dir / file).resolve() for split, file in LOCAL_FILES[name].items()}
    for path in paths.values():
        if not path.is_file():
            raise SettingError(f"task '{name}' needs the file '{path}', which is not there; check --data-dir")
    source = known.task_index[name].yaml_path
    if name in _TEMPLATES:
        import lm_eval.tasks

        source = Path(lm_eval.tasks.__file__).parent / _TEMPLATES[name]
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
