"""The benchmark scripts run and write what they say."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

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


FAST = {
    "fit": ["--width", "70", "--demonstrations", "40", "--wide", "90"],
    "startup": [],
    "growth": [],
    "applying": ["--modes", "eager", "--batches", "2", "--dtypes", "float32", "--prefill", "9", "--context", "5"],
    "plan": ["--demonstrations", "3"],
    "collection": ["--demonstrations", "2", "--alone", "2"],
}
SMALL: dict[str, dict[str, object]] = {
    "growth": {
        "RANKS": (4, 8),
        "TOKENS": (1, 4),
        "WIDTHS": (16, 32),
        "LAYERS": (1, 2),
        "START": {"rank": 4, "tokens": 4, "width": 16, "layers": 1},
    },
}
"""What a script has no option for."""


@pytest.mark.slow
@pytest.mark.usefixtures("embedded_stand_in")
@pytest.mark.parametrize("name", FAST)
def test_benchmarks_of_speed_run_and_write_what_they_print(name, tmp_path, request, monkeypatch, capsys):
    file = tmp_path / "figures.json"
    options = ["--rounds", "1", *FAST[name], "--json", str(file)]
    if name == "collection":
        options += ["--data-dir", str(request.getfixturevalue("data_dir"))]
    script = INTERVAL_COVERAGE.with_name(f"{name}.py")
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [str(script), *options])
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    for constant, value in SMALL.get(name, {}).items():
        monkeypatch.setattr(module, constant, value)

    module.main()

    printed = capsys.readouterr().out
    record = json.loads(file.read_text(encoding="utf-8"))
    assert {"processor", "threads", "python", "sealign", "torch"} <= set(record["machine"])
    assert len(record) > 1
    assert "1 rounds" in printed or name == "growth"
    if name == "fit":
        assert len(record["beside"]) == 2
        for found in record["beside"].values():
            assert found["largest_angle"] < 1e-4
            assert found["ranks"][0] == found["ranks"][1]


@pytest.mark.slow
def test_the_script_for_gpus_measures_everything_in_small(tmp_path):
    file = tmp_path / "gpu.json"
    # In a process of its own: annotations that are checked at run time cannot be traced.
    script = str(INTERVAL_COVERAGE.with_name("gpu.py"))
    command = [sys.executable, script, "--small", "--rounds", "1", "--output", str(file)]

    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["failed"] == record["skipped"] == {}
    measured = record["measurements"]
    assert list(measured) == [
        *("model", "collection", "decomposition of a layer", "fit of all layers", "correctness"),
        *("eager, batch 2", "operator, 3 tokens", "generate with a static cache, batch 2", "compiled, batch 2"),
    ]
    assert measured["fit of all layers"]["ranks"] == {"SEA": 6, "SEA, unscaled": 6, "shift": 0}
    eager = measured["eager, batch 2"]
    assert list(eager["prefill"]["ratios"]) == ["SEA", "SEA, unscaled", "shift", "merged", "dense"]
    differences = eager["largest_differences"]
    # In bfloat16, the forms of one edit agree better than the edited model with the bare one.
    assert 3 * differences["unscaled to merged"] < differences["SEA to bare"]
    assert 3 * differences["SEA to dense"] < differences["SEA to bare"]
    static = measured["generate with a static cache, batch 2"]["largest_differences"]
    assert 3 * static["SEA, static to eager"] < static["SEA to bare"]
    checked = measured["correctness"]["largest_differences"]
    assert checked["torch.float32"]["edited"] <= 1e-4 < checked["effect"]
    assert all(name in printed for name in measured)


def test_the_script_for_gpus_keeps_its_time_limit_and_its_failures(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(INTERVAL_COVERAGE.parent)
    file = tmp_path / "gpu.json"
    results = importlib.import_module("gpu").Measurements(file, 50, rounds=3)

    def fail():
        raise RuntimeError("out of memory")

    results.take("broken", fail)
    results.take("long", lambda: {}, expected=60)
    results.take("short", lambda: {"seconds": 2}, expected=40)

    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["failed"] == {"broken": "RuntimeError: out of memory"}
    assert list(record["skipped"]) == ["long"]
    assert record["skipped"]["long"].startswith("60 s expected, ")
    assert record["measurements"]["short"]["seconds"] == 2
    assert record["rounds"] == 3
    assert not results.complete


@pytest.fixture
def directions(monkeypatch):
    monkeypatch.syspath_prepend(INTERVAL_COVERAGE.parent)
    return importlib.import_module("directions")


def test_directions_are_what_their_names_say(directions):
    generator = torch.Generator().manual_seed(0)
    h, plus, minus = (torch.randn(9, 6, generator=generator) for _ in range(3))
    text, x = torch.randn(20, 6, generator=generator), torch.randn(2, 3, 6, generator=generator)
    change = {name: edit(x) - x for name, edit in directions.variants(h, plus, minus, text).items()}
    difference = (plus - minus).mean(0)

    def close(name, expected):
        torch.testing.assert_close(change[name], expected.expand_as(x), rtol=1e-4, atol=1e-5)

    close("mean difference", difference)
    close("scaled by the token's norm", x.norm(dim=-1, keepdim=True) * difference)
    u, s, v = torch.linalg.svd(h.T @ (plus - minus))
    close("difference operator, rank 2", x @ u[:, :2] @ torch.diag(s[:2] / s[0]) @ v[:2])
    close("read mean of H, write mean difference", (x @ h.mean(0))[..., None] * difference)
    # A rotation leaves the norm as it is, to first order.
    assert float((change["rotation on the sphere"] * x).sum(-1).abs().max()) < 1e-4
    # Transport maps the sorted coordinates of the negatives to those of the positives as well as a line can.
    slope = [np.polyfit(np.sort(minus[:, i]), np.sort(plus[:, i]), 1) for i in range(6)]
    found = change["linear transport per neuron"] + x
    expected = torch.tensor([[[np.polyval(slope[i], float(row[i])) for i in range(6)] for row in rows] for rows in x])
    torch.testing.assert_close(found, expected, check_dtype=False, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("embedded_stand_in")
def test_directions_compares_each_variant_with_the_mean_difference(directions, tmp_path, monkeypatch, capsys):
    file = tmp_path / "directions.json"
    monkeypatch.setattr(sys, "argv", ["directions", "--pairs", "16", "--layers", "1,2", "--json", str(file)])
    monkeypatch.setenv("COLUMNS", "200")
    directions.main()

    printed = capsys.readouterr().out
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["layers"] == [1, 2]
    assert set(record["summaries"]) == {"residual", "attention"}
    for site, rows in record["summaries"].items():
        assert rows["mean difference"]["ratio"] == 1
        assert all(name in printed for name in rows)
        for name, row in rows.items():
            pairs = record["found"][site][name]["pairs"]
            assert row["efficiency"] == pytest.approx(np.mean(pairs), nan_ok=True)
            assert row["error"] == pytest.approx(np.std(pairs, ddof=1) / len(pairs) ** 0.5, nan_ok=True)
