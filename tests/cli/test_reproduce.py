"""``sealign reproduce`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli import test_app as shared
from tests.cli.test_app import passed, refused, run
from tests.evaluation_data import HARNESS_WARNINGS

cache = shared.cache
model_folder = shared.model_folder
one_thread = shared.one_thread

pytestmark = [pytest.mark.slow, *HARNESS_WARNINGS]


def test_a_table_is_printed_and_written(model_folder: Path, data_dir: Path, tmp_path: Path) -> None:
    args: list[object] = ["reproduce", "table-activations", "--model", model_folder, "--data-dir", data_dir]
    args += ["--limit", "3", "--demonstrations-limit", "30", "--output", tmp_path / "paper"]
    printed = passed(*args)
    assert "| random token |" in printed
    folder = tmp_path / "paper" / "table-activations"
    assert {path.name for path in folder.iterdir()} == {
        "sealign.json",
        "table-activations.csv",
        "table-activations.tex",
        "table-activations.md",
        "index.html",
        "target.json",
    }
    settings = json.loads((folder / "target.json").read_text())["settings"]
    assert settings["demonstrations"] == {"halueval_qa": 30, "bbq": 30}
    assert (folder / "table-activations.md").read_text().split("\n\n", 1)[1].strip() in printed
    assert "(finished before)" in passed(*args)
    (made,) = json.loads(passed(*args, "--json"))
    page = str(folder / "index.html")
    assert made == {"target": "table-activations", "page": page, "finished_before": True, "error": None}


def test_errors(model_folder: Path, tmp_path: Path) -> None:
    base: list[object] = ["reproduce", "--model", model_folder, "--output", tmp_path / "paper"]
    refused(*base, "table-bqb", words=("did you mean 'table-bbq'",))
    refused(*base, "table-bbq", "--limit", "1", words=("limit is 1", "at least 2"))
    refused(*base, "table-bbq", "--judge-url", "http://localhost:1/v1", words=("--judge",))
    for option, target in (("--also", "table-bbq"), ("--amateur", "table-crows"), ("--behaviours", "all")):
        refused(*base, target, option, "smollm2", words=(f"{option} is for the targets ", f", not for {target}; leave"))
    refused(*base, "table-joint", "--judge", "smollm2", words=("--judge is for the targets table-truthfulqa, not for",))
    refused(*base, "figure-tsne", "--limit", 3, words=("--limit is for the targets table-truthfulqa, table-bbq,",))
    assert not (tmp_path / "paper").exists()
    failed = run(*base, "table-bbq", "--data-dir", tmp_path)
    assert failed.exit_code == 2
    assert failed.stderr.startswith("error: table-bbq: there is no file")
