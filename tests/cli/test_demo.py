from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

import sealign
from sealign.cli.consoles import output
from sealign.models import embedded_model
from sealign.reproduce import embedded_demo as demo
from sealign.reproduce.embedded_demo import DEMO_BEHAVIOURS, BehaviourResult, run_demo
from tests.cli import test_app as shared
from tests.cli.test_app import (
    listing,
    passed,
    printed_python,
    program,
    refused,
    replaced,
    table_rows,
    without_progress,
)

cache = shared.cache
model_folder = shared.model_folder
one_thread = shared.one_thread

ARMS = {"edited": "edited", "random": "random, mean of 3 draws", "reversed": "reversed"}
METRICS = ("margin", "accuracy")


@dataclass
class Shown:
    """What the demo says of the tiny model as JSON, what it found, and where it saved the edits."""

    data: dict[str, Any]
    results: dict[str, BehaviourResult]
    folder: Path


@pytest.fixture(scope="session")
def shown(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    folder = tmp_path_factory.mktemp("demo") / "edits"
    results: dict[str, Any] = {}

    def keep(model: Any, tokenizer: Any, behaviour: str, **kwargs: Any) -> Any:
        results[behaviour] = run_demo(model, tokenizer, behaviour, **kwargs)
        return results[behaviour]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "run_demo", keep)
        data = json.loads(passed("demo", "--model", model_folder, "--output", folder, "--json"))
    return Shown(data, results, folder)


@pytest.fixture
def calls(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the command asks of the library, which answers with what it has found before."""
    asked: list[dict[str, Any]] = []

    def known(_model: Any, _tokenizer: Any, behaviour: str, **kwargs: Any) -> BehaviourResult:
        asked.append({"behaviour": behaviour, **kwargs})
        return shown.results[behaviour]

    monkeypatch.setattr(demo, "run_demo", known)
    return asked


def test_every_part_is_there(shown: Shown) -> None:
    assert list(shown.data) == list(DEMO_BEHAVIOURS)
    for name, data in shown.data.items():
        assert data["saved"] == str(shown.folder / name)
        saved = json.loads((shown.folder / name / "edit.json").read_text())
        assert saved == data["edit"] | {"tensors_hash": saved["tensors_hash"]}
        assert sealign.load_edit(shown.folder / name).hash == shown.results[name].edit.hash
        assert data["held_out"] >= 30
        assert [effect["name"] for effect in data["effects"]] == [f"preference_{metric}" for metric in METRICS]
        for effect in data["effects"]:
            for arm in (*ARMS, "over_random"):
                assert effect[arm]["low"] <= effect[arm]["difference"] <= effect[arm]["high"]
                assert effect[arm]["items"] == data["held_out"]
        assert set(data["divergence"]) == set(data["domain_divergence"]) == {"edited", "random directions", "reversed"}
        assert data["verdict"]["sentence"] == shown.results[name].verdict.sentence


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("width", [80, 120])
def test_tables_and_json_hold_the_same_figures(
    shown: Shown, model_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, width: int
) -> None:
    monkeypatch.setattr(output, "width", width)
    folder = tmp_path / "edits"
    text = passed("demo", "--model", model_folder, "--output", folder)
    assert "…" not in text
    tables = text[: text.index("Saved to ")]
    assert max(map(cell_len, tables.split("\n"))) <= width
    whole = " ".join(text.split())
    rows = table_rows(tables)
    for name, data in shown.data.items():
        assert f"{name}: {data['verdict']['sentence']}" in whole
        assert f"{data['held_out']} held-out demonstrations" in whole
        for effect in data["effects"]:
            for arm, label in ARMS.items():
                d = effect[arm]
                interval = f"[{d['low']:+.3f}, {d['high']:+.3f}]"
                assert ["", label, f"{d['edited']:.3f}", f"{d['difference']:+.3f}", interval] in rows
        for arm, divergence in data["divergence"].items():
            own = data["domain_divergence"][arm]
            assert [f"{divergence:.4f}", f"{own:.4f}"] in [row[2:] for row in rows if row[0] == arm and len(row) == 4]
        for answer in data["answers"]:
            assert answer["prompt"] in " ".join(" ".join(row[0] for row in rows if len(row) == 3).split())
    # The printed lines load the first edit.
    space: dict[str, Any] = {}
    exec(printed_python(text), space)
    assert space["edit"].hash == shown.results[DEMO_BEHAVIOURS[0]].edit.hash
    assert text.rstrip().splitlines()[-1].startswith(f"sealign generate --edit {folder / DEMO_BEHAVIOURS[0]} ")


def test_options(calls: list[dict[str, Any]], model_folder: Path, tmp_path: Path) -> None:
    args = ("demo", "--model", model_folder, "--output", tmp_path / "edits", "--json")
    passed(*args, "--behaviours", "truthfulness")
    replaced(*args, "--strength", 0.5, "--seed", 3)
    replaced(*args, "--quick")
    assert [(call["behaviour"], call["strength"], call["seed"], call["quick"]) for call in calls] == [
        ("truthfulness", None, 0, False),
        ("positivity", 0.5, 3, False),
        ("truthfulness", 0.5, 3, False),
        ("positivity", None, 0, True),
    ]


def test_the_short_version_says_what_it_is(
    shown: Shown, model_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = dataclasses.replace(shown.results["positivity"], quick=True)
    monkeypatch.setattr(demo, "run_demo", lambda *_, **__: result)
    args = ("demo", "--model", model_folder, "--output", tmp_path / "edits", "--quick")
    words = " ".join(passed(*args).split())
    fitted = len(result.edit.record.fitted_on)
    assert f"Short version with {fitted} pairs to fit on and {result.held_out} to measure" in words
    assert listing(tmp_path / "edits")[0] == "positivity"
    data = json.loads(replaced(*args, "--json"))
    assert list(data) == ["positivity"]
    assert data["positivity"]["quick"]


def test_refusals(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "thesis" / "truthfulness").mkdir(parents=True)
    (tmp_path / "thesis" / "truthfulness" / "chapter.tex").write_text("x")
    args = ("demo", "--model", model_folder, "--output")
    refused(*args, tmp_path / "thesis", words=("truthfulness' is not empty and has no edit.json", "choose a new"))
    refused(*args, tmp_path / "new", "--behaviours", "bravery", words=("unknown behaviour 'bravery'", "positivity"))
    refused(*args, tmp_path / "new", "--strength", "nan", words=("strength is nan", "must be finite"))
    refused(*args, tmp_path / "new", "--dtype", "floaty", words=("unknown dtype 'floaty'",))
    refused("demo", "--model", "smollm", "--output", tmp_path / "new", words=("did you mean 'smollm2'?",))
    assert listing(tmp_path) == ["thesis", "thesis/truthfulness", "thesis/truthfulness/chapter.tex"]


def test_no_room_for_the_converted_model(
    tmp_path: Path, model_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tiny model in place of the embedded one, whose conversion takes long."""
    monkeypatch.setattr(embedded_model, "read_pretrained", lambda *_: sealign.load_model(str(model_folder)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        words = ("cannot write the converted model", str(cache), "too large", "free some space", "SEALIGN_CACHE")
        refused("demo", "--output", tmp_path / "edit", words=words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert listing(tmp_path) == []
    assert listing(cache) == ["models"]


@pytest.mark.slow
def test_the_embedded_model_as_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new user sees: an edit that helps, by its own verdict, which is computed from the printed figures."""
    monkeypatch.delenv("SEALIGN_CACHE")  # the model is converted once for all tests
    embedded_model.embedded_model()
    monkeypatch.chdir(tmp_path)
    command = program("demo", "--quick", "--dtype", "bfloat16")
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0
    assert without_progress(result.stderr) == ""
    text = result.stdout
    assert "…" not in text
    rows = table_rows(text)
    margins = {row[1]: row for row in rows[[row[0] for row in rows].index("margin") :][:4] if len(row) == 5}
    low, high = map(float, margins["edited"][4].strip("[]").split(","))
    assert 0 < low <= float(margins["edited"][3]) <= high
    assert float(margins["reversed"][3]) < 0
    assert abs(float(margins["random, mean of 3 draws"][3])) < low
    assert "positivity: Helps: it improves preference_margin" in " ".join(text.split())
    # The printed lines run as given, in the folder where the demo ran.
    assert listing(tmp_path / "edits") == [
        "positivity",
        "positivity/README.md",
        "positivity/edit.json",
        "positivity/edit.safetensors",
    ]
    assert text.rstrip().splitlines()[-1].startswith("sealign generate --edit edits/positivity ")
    space: dict[str, Any] = {}
    exec(printed_python(text), space)
    assert space["edit"].layers == [14]
    assert space["model"].config.num_hidden_layers == 30
