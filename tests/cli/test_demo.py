from __future__ import annotations

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
from sealign.cli.app import output
from sealign.models import embedded_model
from sealign.reproduce import embedded_demo as demo
from sealign.reproduce.embedded_demo import DEMO_CONFIG, DEMO_PROMPTS, DemoResult, run_demo
from tests.cli import test_app as shared
from tests.cli.test_app import listing, passed, printed_python, program, refused, table_rows

cache = shared.cache
model_folder = shared.model_folder
one_thread = shared.one_thread

ARMS = ("edited", "random")
METRICS = ("MC1", "MC2")


@dataclass
class Shown:
    """What the demo says of the tiny model as JSON, what it found, and where it saved the edit."""

    data: dict[str, Any]
    result: DemoResult
    folder: Path


@pytest.fixture(scope="session")
def shown(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    folder = tmp_path_factory.mktemp("demo") / "edit"
    results: list[Any] = []

    def keep(*args: Any, **kwargs: Any) -> Any:
        results.append(run_demo(*args, **kwargs))
        return results[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "run_demo", keep)
        data = json.loads(passed("demo", "--model", model_folder, "--output", folder, "--json"))
    return Shown(data, results[0], folder)


@pytest.fixture
def calls(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the command asks of the library, which answers with what it has found before."""
    asked: list[dict[str, Any]] = []

    def known(_model: Any, _tokenizer: Any, **kwargs: Any) -> DemoResult:
        asked.append(kwargs)
        return shown.result

    monkeypatch.setattr(demo, "run_demo", known)
    return asked


def check_parts(data: dict[str, Any], layers: int) -> None:
    """Every part that the demo promises is there, and the verdict agrees with the numbers."""
    assert len(data["edit"]["layers"]) == layers
    for entry in data["edit"]["layers"].values():
        assert min(entry["groups"]) >= 1
        assert len(entry["groups"]) == 2
        assert entry["statistics"]["explained_variance_positive"] >= 0.9
        assert entry["relative_change"] > 0
    assert data["edit"]["strength"] == 0.25
    assert [answer["prompt"] for answer in data["answers"]] == list(DEMO_PROMPTS)
    assert len(data["answers"]) >= 5
    assert all(set(answer) == {"prompt", "base", "edited"} for answer in data["answers"])
    assert set(data["scores"]) == {f"{arm} {metric}" for arm in (*ARMS, "over_random") for metric in METRICS}
    for score in data["scores"].values():
        assert score["low"] <= score["difference"] <= score["high"]
        assert score["edited"] - score["base"] == pytest.approx(score["difference"])
        assert score["items"] >= 60
    damage = data["damage"]
    assert min(damage[f"{name}_loss"] for name in ("base", "edited", "random")) > 0
    assert min(damage["edited_divergence"], damage["random_divergence"]) > 0
    cost = damage["edited_loss"] - damage["base_loss"]
    check_verdict(data["verdict"], data["scores"], cost)


def check_verdict(verdict: str, scores: dict[str, dict[str, Any]], cost: float) -> None:
    """The word agrees with the numbers, by a rule for two metrics."""
    assert f"costs {cost:+.3f} nats" in verdict or f"at {cost:+.3f} nats" in verdict
    smaller = min(scores[f"edited {metric}"]["p_value"] for metric in METRICS)
    if cost > 0.05:
        assert verdict.startswith("Harms")
    elif 2 * smaller > 0.05:
        assert verdict.startswith("No evidence")
    elif max(scores[f"edited {metric}"]["difference"] for metric in METRICS) <= 0:
        assert verdict.startswith("Harms")


def test_every_part_is_there(shown: Shown) -> None:
    check_parts(shown.data, layers=3)
    assert shown.data["saved"] == str(shown.folder)
    saved = json.loads((shown.folder / "edit.json").read_text())
    assert saved == shown.data["edit"] | {"tensors_hash": saved["tensors_hash"]}
    assert sealign.load_edit(shown.folder).hash == shown.result.edit.hash
    assert shown.result.edit.layers == [1, 2, 3]


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("width", [80, 120])
def test_tables_and_json_hold_the_same_figures(
    shown: Shown, model_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, width: int
) -> None:
    monkeypatch.setattr(output, "width", width)
    data, folder = shown.data, tmp_path / "edit"
    text = passed("demo", "--model", model_folder, "--output", folder)
    assert "…" not in text
    tables = text[: text.index("Saved to ")]
    assert max(map(cell_len, tables.split("\n"))) <= width
    rows = table_rows(tables)
    for layer, entry in data["edit"]["layers"].items():
        assert [layer, " + ".join(map(str, entry["groups"]))] in [row[:2] for row in rows if len(row) == 8]
    for metric in METRICS:
        start = next(index for index, row in enumerate(rows) if row[:2] == [metric, "base"])
        printed = {row[1].partition(",")[0]: row[2:] for row in rows[start : start + 3]}
        assert printed["base"] == [f"{data['scores'][f'edited {metric}']['base']:.3f}", "", ""]
        for arm in ARMS:
            score = data["scores"][f"{arm} {metric}"]
            interval = f"[{score['low']:+.3f}, {score['high']:+.3f}]"
            assert printed[arm] == [f"{score['edited']:.3f}", f"{score['difference']:+.3f}", interval]
    damage = data["damage"]
    assert ["base", f"{damage['base_loss']:.3f}", "", ""] in rows
    for name, arm in (("edited", "edited"), ("random directions", "random")):
        loss, divergence = damage[f"{arm}_loss"], damage[f"{arm}_divergence"]
        assert [name, f"{loss:.3f}", f"{loss - damage['base_loss']:+.3f}", f"{divergence:.4f}"] in rows
    assert data["verdict"] in " ".join(text.split())
    asked = " ".join(row[0] for row in rows if len(row) == 3)
    assert " ".join(asked.split()) == " ".join(DEMO_PROMPTS)
    assert "66 held-out questions" in text
    assert "mean loss on neutral text" in text
    # The printed lines load the edit.
    space: dict[str, Any] = {}
    exec(printed_python(text), space)
    assert space["edit"].hash == shown.result.edit.hash
    assert text.rstrip().splitlines()[-1].startswith(f"sealign generate --edit {folder} ")


def test_strength_and_seed(calls: list[dict[str, Any]], model_folder: Path, tmp_path: Path) -> None:
    args = ("demo", "--model", model_folder, "--output", tmp_path / "edit", "--json")
    passed(*args)
    passed(*args, "--strength", 0.5, "--seed", 3)
    passed(*args, "--strength", 0)
    assert [call["config"] for call in calls] == [DEMO_CONFIG.replace(strength=strength) for strength in (0.25, 0.5, 0)]
    assert [call["seed"] for call in calls] == [0, 3, 0]


def test_refusals(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    args = ("demo", "--model", model_folder, "--output")
    refused(*args, tmp_path / "thesis", words=("thesis' exists and was not written by Sealign", "choose a new"))
    refused(*args, tmp_path / "new", "--strength", "nan", words=("strength is nan", "must be finite"))
    refused(*args, tmp_path / "new", "--dtype", "floaty", words=("unknown dtype 'floaty'",))
    refused("demo", "--model", "smollm", "--output", tmp_path / "new", words=("did you mean 'smollm2'?",))
    assert listing(tmp_path) == ["thesis", "thesis/chapter.tex"]


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
    """What a new user sees."""
    monkeypatch.delenv("SEALIGN_CACHE")  # the model is converted once for all tests
    embedded_model.embedded_model()
    monkeypatch.chdir(tmp_path)
    result = subprocess.run(program("demo", "--dtype", "bfloat16"), capture_output=True, text=True, env=os.environ)
    assert (result.returncode, result.stderr) == (0, "")
    text = result.stdout
    assert "…" not in text
    assert "Edited layers: model.layers.{layer}.mlp" in text
    rows = table_rows(text)
    assert [row[0] for row in rows if len(row) == 8] == [str(layer) for layer in range(10, 30)]
    asked = " ".join(row[0] for row in rows if len(row) == 3)
    assert " ".join(asked.split()) == " ".join(DEMO_PROMPTS)
    assert "Rayleigh scattering" in " ".join(row[1] for row in rows if len(row) == 3 and row[1]).replace("  ", " ")
    assert [row[0] for row in rows if len(row) == 5] == ["MC1", "", "", "MC2", "", ""]
    for line in [row for row in rows if len(row) == 5 and row[1] != "base"]:
        low, high = map(float, line[4].strip("[]").split(","))
        assert low <= float(line[3]) <= high
    damage = {row[0]: row[1:] for row in rows if len(row) == 4}
    assert set(damage) == {"base", "edited", "random directions"}
    assert 3 < float(damage["base"][0]) < 4
    cost = float(damage["edited"][1])
    assert 0 < cost < 0.1  # a mild edit
    assert f"costs {cost:+.3f} nats per token on neutral text" in " ".join(text.split())
    # The printed lines run as given, in the folder where the demo ran.
    assert listing(tmp_path / "edits") == [
        "truthfulness",
        "truthfulness/README.md",
        "truthfulness/edit.json",
        "truthfulness/edit.safetensors",
    ]
    assert text.rstrip().splitlines()[-1].startswith("sealign generate --edit edits/truthfulness ")
    space: dict[str, Any] = {}
    exec(printed_python(text), space)
    assert space["edit"].layers == list(range(10, 30))
    assert space["model"].config.num_hidden_layers == 30
