from __future__ import annotations

import json
import os
import pty
import select
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sealign.cli.plan_display import duration, plan_line, plan_table, size
from sealign.fitting.activation_store import Keep
from sealign.fitting.plan import FitPlan
from tests.cli import test_app as shared
from tests.cli.test_app import listing, passed, program, refused

cache = shared.cache
one_thread = shared.one_thread
model_folder = shared.model_folder
rows = shared.rows


def test_sizes_and_durations_in_readable_units() -> None:
    assert [size(count) for count in (7, 2000, 3 * 2**20, 140e9)] == ["7 B", "1.95 KiB", "3 MiB", "130.4 GiB"]
    assert [duration(seconds) for seconds in (0.0123, 59, 61, 86400)] == ["0.012 s", "59 s", "1 min", "24 h"]


def test_a_plan_is_printed_and_nothing_is_written(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    before = listing(tmp_path)
    command = ["fit", "--plan", "--model", model_folder, "--demonstrations", rows, "--layers", "last:3"]
    printed = passed(*command)
    assert "7, " in printed
    assert "tokens to run" in printed
    assert "3 of width 48" in printed
    record = json.loads(passed(*command, "--output", tmp_path / "edit", "--json", "--tflops", 2))
    assert (record["demonstrations"], record["layers"], record["width"], record["tflops"]) == (7, 3, 48, 2.0)
    assert record["keep"] == {"kept": "rows", "place": "memory"}
    assert record["kept_bytes"] == 7 * 48 * 3 * 12
    assert listing(tmp_path) == before


def test_what_does_not_go_together(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    command = ["fit", "--model", model_folder, "--demonstrations", rows]
    refused(*command, words=("no folder to write the edit to", "--output", "--plan"))
    words = ("--tflops is used by --plan only", "add --plan")
    refused(*command, "--output", tmp_path / "edit", "--tflops", 3, words=words)
    refused(*command, "--plan", "--tflops", 0, words=("tflops is 0", "above 0"))
    refused(*command, "--plan", "--model", tmp_path / "none", words=("none",))


def test_the_estimate_comes_before_the_fit_on_a_terminal(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    command = program("fit", "--model", model_folder, "--demonstrations", rows, "--output", tmp_path / "edit")
    shown = b""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(subprocess.run, command, stdout=subprocess.PIPE, stderr=end, text=True, timeout=120)
        # Read all the while, because the buffer of a terminal is small.
        while not running.done() or select.select([terminal], [], [], 0)[0]:
            if select.select([terminal], [], [], 0.1)[0]:
                shown += os.read(terminal, 1 << 16)
    result, told = running.result(), shown.decode()
    os.close(end)
    os.close(terminal)
    assert result.returncode == 0
    assert "7 demonstrations, " in told
    assert "to decompose" in told
    assert "7 demonstrations, " not in result.stdout


@pytest.mark.parametrize(("place", "words"), [("memory", "in memory"), ("disk", "in a memory-mapped file")])
def test_all_of_a_plan_is_shown(place: str, words: str) -> None:
    from rich.console import Console

    plan = FitPlan(
        demonstrations=2000,
        tokens=240_123,
        layers=21,
        width=4096,
        parameters=46_700_000_000,
        active_parameters=12_600_000_000,
        model_bytes=93_400_000_000,
        keep=Keep("rows", place),  # type: ignore[arg-type]
        kept_bytes=2_064_384_000,
        peak_bytes=95_000_000_000,
        factor_bytes=688_128,
        tflops=150.0,
        collection_seconds=40.3,
        decomposition_seconds=95.0,
    )
    console = Console(width=120)
    with console.capture() as capture:
        console.print(plan_table(plan))
    figures = ("46.70B", "12.60B", "87.0 GiB", "240123 tokens", "1.9 GiB as rows", "40 s", "1.6 min", "150 TFLOP/s")
    for shown in (*figures, words):
        assert shown in capture.get()
    assert words in plan_line(plan)
    assert "about 40 s to collect and 1.6 min to decompose 21 layers" in plan_line(plan)
