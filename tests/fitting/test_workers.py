"""Fits by several workers against those of one, started as a user starts them."""

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
from sealign.fitting.edit_config import EditConfig
from sealign.fitting.workers import (
    gather_objects,
    gather_rows,
    own_share,
    rank_and_size,
    sum_over_workers,
    worker_group,
)
from tests.tiny_models import build_model

PYTHON = sys.executable
TORCHRUN = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# On CPUs this is how Accelerate starts several processes without MPI.
ACCELERATE = [PYTHON, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]

CONFIGS: dict[str, EditConfig] = {
    "sea": sealign.SEAConfig(rank=(3, 2)),
    "sea by signature": sealign.SEAConfig(token="random", centered=True, layers="signature:2"),
    "mean difference": sealign.MeanDifferenceConfig(layers="all", token="mean"),
    "iti": sealign.ITIConfig(heads=3),
    "leace": sealign.LEACEConfig(layers="1,2"),
}

SCRIPT = """
import sys
from pathlib import Path

import torch

import sealign
from sealign.fitting.activation_store import Keep
from sealign.fitting.workers import gather_objects, gather_rows, own_share, rank_and_size, sum_over_workers
from sealign.fitting.workers import worker_group
from tests.fitting.test_workers import CONFIGS

folder = Path(sys.argv[1])
with worker_group() as first:
    rank, size = rank_and_size()
    assert (size, first) == (2, rank == 0)
    for n in (1, 2, 5, 6):  # one row more for the first worker, and as many for both
        rows = torch.arange(3.0 * n).reshape(n, 3)
        assert torch.equal(gather_rows(rows[own_share(range(n))]), rows)
    assert sum_over_workers(torch.tensor([rank + 1.0])).tolist() == [3.0]
    assert gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    model, tokenizer = sealign.load_model(str(folder / "model"), dtype="float32", device="cpu")
    demonstrations = sealign.load_demonstrations(folder / "demonstrations.jsonl")
    for name, config in CONFIGS.items():
        edit = sealign.fit_edit(model, tokenizer, demonstrations, config=config)
        assert len(set(gather_objects(edit.hash))) == 1
        if first:
            edit.save_pretrained(folder / name)
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=CONFIGS["sea"], keep=Keep("sums"))
    if first:
        edit.save_pretrained(folder / "sea of sums")
assert rank_and_size() == (0, 1)
assert not torch.distributed.is_initialized()
"""


def test_one_process_is_a_group_of_itself() -> None:
    tensor = torch.ones(2, 3)
    with worker_group() as first:
        assert first
        assert rank_and_size() == (0, 1)
        assert sum_over_workers(tensor) is tensor
        assert gather_rows(tensor) is tensor
        assert gather_objects("a") == ["a"]
        assert own_share("abc") == "abc"
        assert not torch.distributed.is_initialized()


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


def environment(cache: Path) -> dict[str, str]:
    paths = {"SEALIGN_CACHE": str(cache), "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return os.environ | paths | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def assert_same_edit(together: sealign.Edit, alone: sealign.Edit) -> None:
    assert alone.layers == together.layers
    assert together.record.demonstrations_hash == alone.record.demonstrations_hash
    assert together.record.config == alone.record.config
    identity = torch.eye(alone.width, dtype=torch.float64)
    for layer in alone.layers:
        own, other = together.affine_edits[layer], alone.affine_edits[layer]
        assert own.rank == other.rank
        torch.testing.assert_close(own.linear_part(identity), other.linear_part(identity), atol=1e-4, rtol=1e-4)
        constants = [found.constant_part() for found in (own, other)]
        if constants[1] is None:
            assert constants[0] is None
        else:
            torch.testing.assert_close(*constants, atol=1e-4, rtol=1e-4)
        records = [edit.record.layers[str(layer)] for edit in (together, alone)]
        assert records[0].statistics == pytest.approx(records[1].statistics, rel=1e-4)
        assert records[0].relative_change == pytest.approx(records[1].relative_change, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_workers_give_the_edits_of_one(launcher: list[str], folder: Path, tmp_path: Path) -> None:
    """Seven demonstrations, so that one worker has four and the other three."""
    script = folder / "fits.py"
    script.write_text(SCRIPT)
    command = [*launcher, str(script), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path), timeout=300)
    assert result.returncode == 0, result.stderr
    model, tokenizer = sealign.load_model(str(folder / "model"), dtype="float32", device="cpu")
    demonstrations = sealign.load_demonstrations(folder / "demonstrations.jsonl")
    for name, config in CONFIGS.items():
        alone = sealign.fit_edit(model, tokenizer, demonstrations, config=config)
        assert_same_edit(sealign.Edit.from_pretrained(folder / name), alone)
        if name == "sea":
            assert_same_edit(sealign.Edit.from_pretrained(folder / "sea of sums"), alone)


@pytest.mark.slow
def test_a_worker_that_dies_stops_the_job_and_its_finished_part_is_read_again(folder: Path, tmp_path: Path) -> None:
    """The second worker is killed once both have collected, before its part of the sums; then no batch is run again."""
    cache = tmp_path / "cache"
    script = folder / "dies.py"
    script.write_text(
        f"""
import os, pathlib, signal, time
from sealign.fitting.collector import Collector
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
else:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun may stop this worker before it says what it noticed
main()
"""
    )
    fit = ["fit", "--model", str(folder / "model"), "--demonstrations", str(folder / "demonstrations.jsonl")]
    command = [*TORCHRUN, str(script), *fit, "--output", str(folder / "died"), "--rank", "2,2"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(cache), timeout=200)
    assert result.returncode != 0
    assert not (folder / "died").exists()
    assert "SIGKILL" in result.stderr
    assert "another worker has exited, so the job cannot continue" in result.stderr
    assert len(list((cache / "fits").glob("activations-*/activations-*.safetensors"))) == 2  # one of each worker
    again = subprocess.run(
        command, capture_output=True, text=True, env=environment(cache) | {"AGAIN": "1"}, timeout=200
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("saved") <= 1
    assert not list((cache / "fits").iterdir())  # all of them are in the edit
    model, tokenizer = sealign.load_model(str(folder / "model"), dtype="float32", device="cpu")
    demonstrations = sealign.load_demonstrations(folder / "demonstrations.jsonl")
    alone = sealign.fit_edit(model, tokenizer, demonstrations, config=sealign.SEAConfig(rank=(2, 2)))
    assert_same_edit(sealign.Edit.from_pretrained(folder / "died"), alone)


@pytest.mark.slow
def test_workers_that_do_not_come(tmp_path: Path) -> None:
    """One of two processes is started by itself, on a port where nobody listens."""
    alone = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "nowhere"}
    code = "from sealign.fitting.workers import worker_group\nwith worker_group():\n    pass"
    result = subprocess.run(
        [PYTHON, "-c", code], capture_output=True, text=True, env=environment(tmp_path) | alone, timeout=200
    )
    assert result.returncode != 0
    assert "WorkerError: one of 2 workers cannot connect to the others" in result.stderr
    assert "start them with torchrun or accelerate launch" in result.stderr
