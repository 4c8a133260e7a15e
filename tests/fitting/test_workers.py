"""A fit by several workers against that of one, started as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sealign
from sealign.demonstrations.demonstration import Demonstration
from sealign.fitting.workers import (
    gather_objects,
    gather_rows,
    own_share,
    rank_and_size,
    sum_over_workers,
    worker_group,
)
from tests.tiny_models import build_model

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_one_process_is_a_group_of_itself() -> None:
    tensor = torch.ones(2, 3)
    with worker_group() as first:
        assert first
        assert rank_and_size() == (0, 1)
        assert sum_over_workers(tensor) is tensor
        assert gather_rows(tensor) is tensor
        assert gather_objects("a") == ["a"]
        assert own_share("abc") == "abc"


@pytest.fixture
def folder(tokenizer: Any, demonstrations: list[Demonstration], tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    build_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [
        json.dumps({"prompt": item.prompt, "positive": item.positive, "negative": item.negative})
        for item in demonstrations
    ]
    (folder / "demonstrations.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def arguments(folder: Path, output: str, *more: str) -> list[str]:
    return [
        *("-m", "sealign", "fit", "--model", str(folder / "model")),
        *("--demonstrations", str(folder / "demonstrations.jsonl"), "--output", str(folder / output), *more),
    ]


def environment(cache: Path) -> dict[str, str]:
    return os.environ | {"SEALIGN_CACHE": str(cache), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--rank", "3,2"), ("--token", "random", "--centered", "--layers", "signature:2")])
def test_two_workers_give_the_edit_of_one(folder: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    """Seven demonstrations, so that one worker has four and the other three."""
    for output, launcher in (("alone", [sys.executable]), ("together", TORCHRUN)):
        result = subprocess.run(
            [*launcher, *arguments(folder, output, *more)],
            capture_output=True,
            text=True,
            env=environment(tmp_path),
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("saved") <= 1
    alone, together = (sealign.Edit.from_pretrained(folder / name) for name in ("alone", "together"))
    assert alone.layers == together.layers
    assert together.record.demonstrations_hash == alone.record.demonstrations_hash
    for layer in alone.layers:
        own, other = together.affine_edits[layer], alone.affine_edits[layer]
        assert own.rank == other.rank
        u, v = (edit.linear_part(torch.eye(edit.width, dtype=torch.float64)) for edit in (own, other))
        torch.testing.assert_close(u, v, atol=1e-4, rtol=1e-4)
        records = [edit.record.layers[str(layer)] for edit in (together, alone)]
        assert records[0].statistics == pytest.approx(records[1].statistics, rel=1e-4)
        assert records[0].relative_change == pytest.approx(records[1].relative_change, rel=1e-3)


@pytest.mark.slow
def test_a_worker_that_dies_stops_the_job_and_its_finished_part_is_read_again(folder: Path, tmp_path: Path) -> None:
    """The second worker is killed once both have collected, before its part of the sums; then no batch is run again."""
    cache = tmp_path / "cache"
    script = folder / "dies.py"
    script.write_text(
        f"""
import os, pathlib, signal, time
from sealign.fitting.collecting import Collector
from sealign.fitting.layer_statistics import LayerStatistics
from sealign.cli import main

finished = pathlib.Path({str(cache / "fits")!r})


def die(statistics):
    while len(list(finished.glob("activations-*"))) < 2:
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)


def run_again(*arguments):
    raise AssertionError("a finished batch is run again")


if "AGAIN" in os.environ:
    Collector._run_batch = run_again
elif os.environ["RANK"] == "1":
    LayerStatistics.combine = die
main()
"""
    )
    command = [*TORCHRUN, str(script), *arguments(folder, "died", "--rank", "2,2")[2:]]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(cache), timeout=200)
    assert result.returncode != 0
    assert not (folder / "died").exists()
    assert "SIGKILL" in result.stderr
    assert len(list((cache / "fits").glob("activations-*/activations-*.safetensors"))) == 2  # one of each worker
    again = subprocess.run(command, capture_output=True, text=True, env=environment(cache) | {"AGAIN": "1"})
    assert again.returncode == 0, again.stderr
    assert (folder / "died" / "edit.json").is_file()
    assert not list((cache / "fits").iterdir())  # all of them are in the edit
