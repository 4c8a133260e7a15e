"""An evaluation of the embedded model that is killed by a signal, again and again, while batches run."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sealign
from sealign.evaluation.results import Results
from tests.evaluation_data import write_truthfulqa

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def finished(folder: Path) -> dict[str, list[str]]:
    """The finished lines of each journal of scores (one a model under test); a torn line is none."""
    files = [path for path in (folder / "journal").glob("*.jsonl") if "damage" not in path.name]
    return {path.name: [line for line in path.read_text().splitlines(True) if line.endswith("\n")] for path in files}


def count(journals: dict[str, list[str]]) -> int:
    return sum(map(len, journals.values()))


def assert_nothing_lost(kept: dict[str, list[str]], found: dict[str, list[str]]) -> None:
    for name, lines in kept.items():
        assert found[name][: len(lines)] == lines


def test_killed_in_the_middle_of_a_batch_and_gone_on_with(tmp_path: Path) -> None:
    model, tokenizer = sealign.load_model("smollm2", dtype="float32")
    demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=8)
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=sealign.SEAConfig(layers="last:2"))
    edit.save_pretrained(tmp_path / "edit")
    write_truthfulqa(tmp_path / "data", 24)

    def command(output: str) -> list[str]:
        words = [sys.executable, "-m", "sealign", "evaluate", "--edit", "edit", "--tasks", "truthfulqa_mc2"]
        words += ["--data-dir", "data", "--control-seeds", "", "--no-reversed"]
        return [*words, "--dtype", "float32", "--output", output]

    whole = subprocess.run(command("whole"), cwd=tmp_path, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr

    kept: dict[str, list[str]] = {}
    kills = 0
    for more in (1, 3, 2):
        running = subprocess.Popen(
            command("killed"), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while running.poll() is None and count(finished(tmp_path / "killed")) < count(kept) + more:
            time.sleep(0.02)
        assert running.poll() is None, "it finished before it could be killed"
        time.sleep(0.1)  # into the next batch
        running.send_signal(signal.SIGKILL)
        running.wait()
        kills += 1
        assert not (tmp_path / "killed" / "results.json").exists()
        found = finished(tmp_path / "killed")
        assert_nothing_lost(kept, found)
        for lines in found.values():
            assert len(set(lines)) == len(lines)  # and nothing was done twice
        kept = found
    last = subprocess.run(command("killed"), cwd=tmp_path, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    assert kills == 3
    assert_nothing_lost(kept, finished(tmp_path / "killed"))
    one, other = (Results.load(tmp_path / name) for name in ("whole", "killed"))
    assert one.tasks == other.tasks
    assert one.damage == other.damage
