"""An evaluation that is killed by a signal several times in the middle of a batch, and continued."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import sealign
from sealign.evaluation.evaluate_edits import evaluate
from sealign.evaluation.evaluation_config import EvaluationConfig
from sealign.evaluation.results import Results
from tests.evaluation_data import HARNESS_WARNINGS, write_truthfulqa
from tests.tiny_models import build_model

pytestmark = [pytest.mark.slow, *HARNESS_WARNINGS]


def run(output: str, before_pass: Any = None, folder: Path = Path()) -> None:
    """Evaluate the edit in a folder on the tasks in it."""
    model, tokenizer = sealign.load_model(str(folder / "model"), dtype="float32", device="cpu")
    if before_pass is not None:
        model.register_forward_pre_hook(before_pass)
    config = EvaluationConfig(
        tasks=["truthfulqa_mc2"], data_dir=folder / "data", control_seeds=(), reversed_control=False
    )
    edit = sealign.load_edit(folder / "edit")
    evaluate(model, tokenizer, {"edit": edit}, config=config, output=folder / output)


def slow_pass(*_: Any) -> None:
    """Let each pass of the model take long enough to be interrupted."""
    time.sleep(0.3)


def finished(folder: Path) -> dict[str, list[str]]:
    """Return the complete lines of each journal of scores; there is one journal per arm."""
    files = [path for path in (folder / "journal").glob("*.jsonl") if "damage" not in path.name]
    return {path.name: [line for line in path.read_text().splitlines(True) if line.endswith("\n")] for path in files}


def count(journals: dict[str, list[str]]) -> int:
    return sum(map(len, journals.values()))


def assert_nothing_lost(kept: dict[str, list[str]], found: dict[str, list[str]]) -> None:
    for name, lines in kept.items():
        assert found[name][: len(lines)] == lines


def test_killed_in_the_middle_of_a_batch_and_continued(tokenizer: Any, demonstrations: Any, tmp_path: Path) -> None:
    build_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model, loaded = sealign.load_model(str(tmp_path / "model"), dtype="float32", device="cpu")
    config = sealign.SEAConfig(rank=2, layers=(1, 3))
    sealign.fit_edit(model, loaded, demonstrations, config=config).save_pretrained(tmp_path / "edit")
    write_truthfulqa(tmp_path / "data", 24)
    run("whole", folder=tmp_path)

    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])  # libraries are imported once for all processes
    kept: dict[str, list[str]] = {}
    for more in (1, 3, 2):
        running = processes.Process(target=run, args=("killed", slow_pass, tmp_path))
        running.start()
        while running.is_alive() and count(finished(tmp_path / "killed")) < count(kept) + more:
            time.sleep(0.02)
        assert running.is_alive(), "it finished before it could be killed"
        time.sleep(0.1)  # into the next batch
        running.kill()
        running.join()
        assert not (tmp_path / "killed" / "results.json").exists()
        found = finished(tmp_path / "killed")
        assert_nothing_lost(kept, found)
        for lines in found.values():
            assert len(set(lines)) == len(lines)  # nothing was computed twice
        kept = found
    run("killed", folder=tmp_path)
    assert_nothing_lost(kept, finished(tmp_path / "killed"))
    one, other = (Results.load(tmp_path / name) for name in ("whole", "killed"))
    assert one.tasks == other.tasks
    assert one.damage == other.damage
