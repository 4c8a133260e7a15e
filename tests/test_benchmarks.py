"""The benchmark scripts run and write what they say."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

INTERVAL_COVERAGE = Path(__file__).parents[1] / "benchmarks" / "interval_coverage.py"


def test_interval_coverage_prints_and_writes_the_share_of_each_kind_and_method(tmp_path):
    file = tmp_path / "coverage.json"
    options = ["--sets", "20", "--resamples", "200", "--seed", "3", "--json", str(file)]
    command = [sys.executable, "-W", "error::RuntimeWarning", str(INTERVAL_COVERAGE), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}

    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["settings"] == {"sets": 20, "resamples": 200, "seed": 3}
    assert set(record["versions"]) == {"python", "numpy", "scipy", "sealign"}
    assert record["seconds"] >= 0
    assert len(record["shares"]) == 7
    for kind, row in record["shares"].items():
        assert kind in printed
        assert list(row) == ["expanded", "percentile", "BCa", "bootstrap-t", "unbounded t"]
        assert all(0 <= share <= 1 and f"{share:.3f}" in printed for share in row.values())
        assert row["expanded"] >= 0.5


def test_interval_coverage_is_set_by_its_seed():
    script = runpy.run_path(str(INTERVAL_COVERAGE))
    draw, truth = script["KINDS"]["60 log-normal"]
    first, again, other = (script["measure"](draw, truth, sets=40, resamples=100, seed=seed) for seed in (0, 0, 1))

    assert first == again
    assert first != other
