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


def lines(folder: Path) -> list[str]:
    """The finished lines of the journal of scores; a torn one is none."""
    files = [path for path in (folder / "journal").glob("*.jsonl") if "damage" not in path.name]
    return [line for path in files for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def test_killed_in_the_middle_of_a_batch_and_gone_on_with(tmp_path: Path) -> None:
    model, tokenizer = sealign.load_model("smollm2", dtype="float32")
    demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=8)
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=sealign.FitConfig(layers="last:2"))
    edit.save_pretrained(tmp_path / "edit")
    write_truthfulqa(tmp_path / "data", 24)

    def command(output: str) -> list[str]:
        words = [sys.executable, "-m", "sealign", "evaluate", "--edit", "edit", "--tasks", "truthfulqa_mc2"]
        words += [
            "--data-dir",
            "data",
            "--control-seeds",
            "",
            "--no-reversed",
            "--dtype",
            "float32",
            "--output",
            output,
        ]
        return words

    whole = subprocess.run(command("whole"), cwd=tmp_path, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr

    kept: list[str] = []
    kills = 0
    for more in (1, 3, 2):
        running = subprocess.Popen(
            command("killed"), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while running.poll() is None and len(lines(tmp_path / "killed")) < len(kept) + more:
            time.sleep(0.02)
        assert running.poll() is None, "it finished before it could be killed"
        time.sleep(0.1)  # into the next batch
        running.send_signal(signal.SIGKILL)
        running.wait()
        kills += 1
        assert not (tmp_path / "killed" / "results.json").exists()
        found = lines(tmp_path / "killed")
        assert found[: len(kept)] == kept  # nothing that was finished is lost
        assert len(set(found)) == len(found)  # and nothing was done twice
        kept = found
    last = subprocess.run(command("killed"), cwd=tmp_path, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    assert kills == 3
    assert lines(tmp_path / "killed")[: len(kept)] == kept
    one, other = (Results.load(tmp_path / name) for name in ("whole", "killed"))
    assert one.tasks == other.tasks
    assert one.damage == other.damage
