"""All targets on a tiny model and real data: results, files, and continuation."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from sealign.errors import SealignError, SettingError
from sealign.reproduce import workbench
from sealign.reproduce.reproduce_config import ReproduceConfig
from sealign.reproduce.table_format import Table
from sealign.reproduce.target_page import Drawing
from sealign.reproduce.targets import TARGETS, chosen_targets, reproduce
from tests.evaluation_data import HARNESS_WARNINGS
from tests.tiny_models import build_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), *HARNESS_WARNINGS]


@pytest.fixture(scope="module")
def models(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folders = []
    for number, (name, layers) in enumerate((("llama", 4), ("qwen2", 3))):
        folder = tmp_path_factory.mktemp(f"model{number}")
        model = build_model(name, vocab_size=len(tokenizer), num_hidden_layers=layers, max_position_embeddings=4096)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders.append(str(folder))
    return folders


@pytest.fixture(scope="module")
def config(models: list[str], data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ReproduceConfig:
    return ReproduceConfig(
        output=tmp_path_factory.mktemp("paper"),
        model=models[0],
        models=(models[1],),
        data_dir=data_dir,
        limit=4,
        demonstrations={"halueval_qa": 52, "bbq": 9},
        dtype="float32",
    )


@pytest.fixture(scope="module")
def made(config: ReproduceConfig) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:  # a random model does not stop by itself
        patch.setattr(workbench, "GENERATED", {"truthfulqa_gen": 9, "gsm8k_cot": 12, "nq_open": 7})
        return dict(reproduce("all", config, command="sealign reproduce all"))


def test_every_target_is_written(made: dict[str, Any], config: ReproduceConfig) -> None:
    assert made.keys() == TARGETS.keys() - {"behaviours"}
    errors = {name: result for name, result in made.items() if isinstance(result, SealignError)}
    assert not errors
    for name, result in made.items():
        folder = config.output / name
        page = (folder / "index.html").read_text(encoding="utf-8")
        assert result.title in page
        assert "sealign reproduce all" in page
        suffixes = ("csv", "tex", "md") if isinstance(result, Table) else ("csv", "pdf", "png")
        assert all((folder / f"{name}.{suffix}").stat().st_size > 0 for suffix in suffixes)
        assert json.loads((folder / "target.json").read_text())["target"] == name


def test_rows_are_the_papers(made: dict[str, Any]) -> None:
    rows = {name: list(result.rows) for name, result in made.items() if isinstance(result, Table)}
    assert set(rows["table-truthfulqa"]) >= {
        "ICL", "LoRA-FT", "ITI", "DoLa", "CD", "ICD", "SEA", "Best-of-N on ICL", "Best-of-N on SEA",
    }  # fmt: skip
    assert rows["table-bbq"] == ["ICL", "LoRA-FT", "SEA", "Phi-SEA"]
    assert len(rows["table-models"]) == 6
    assert rows["table-ablation"][1:] == [
        "SEA", "positive only", "negative only", "average", "reversed", "top 3 layers", "bottom 3 layers",
    ]  # fmt: skip
    assert rows["table-joint"] == ["base", "truthfulness", "fairness", "joint"]
    assert rows["table-activations"] == ["ICL", "last token", "mean token", "random token"]


def test_missing_values_have_a_reason(made: dict[str, Any]) -> None:
    table: Table = made["table-truthfulqa"]
    assert all(cell.value is None and "--amateur" in cell.missing for cell in table.rows["CD"])
    named = [column.name for column in table.columns]
    assert "no judge" in table.rows["SEA"][named.index("Truth %")].missing
    assert table.rows["Best-of-N on ICL"][0].value is None
    assert table.rows["Best-of-N on ICL"][named.index("ROUGE-L acc %")].value is not None
    for row in ("SEA", "LoRA-FT", "Best-of-N on SEA"):
        assert (table.rows[row][named.index("fit, s")].value or 0) > 0
    assert table.rows["ICL"][named.index("fit, s")].value is None
    for result in made.values():
        if isinstance(result, Table):
            for cells in result.rows.values():
                assert all((cell.value is None) == bool(cell.missing) for cell in cells)


def test_every_measured_share_has_an_interval(made: dict[str, Any]) -> None:
    table: Table = made["table-ablation"]
    for cells in table.rows.values():
        for cell in cells[:2]:
            assert cell.value is not None
            assert cell.low is not None
            assert cell.high is not None
            assert cell.low <= cell.value <= cell.high


def test_figures_have_their_data(made: dict[str, Any], config: ReproduceConfig) -> None:
    drawing: Drawing = made["figure-data"]
    with (config.output / "figure-data" / "figure-data.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["x"]) for row in rows if row["series"].startswith("edited")] == [25, 50]
    assert len(rows) == len(drawing.points)
    assert len({point.series for point in made["figure-signature"].points}) == 4


@pytest.mark.usefixtures("made")
def test_finished_targets_are_not_changed(config: ReproduceConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in config.output.glob("*/index.html")}
    assert all(result is None for _, result in reproduce("all", config))
    assert {path: path.stat().st_mtime_ns for path in config.output.glob("*/index.html")} == before


def test_an_interrupted_run_reuses_fits_and_scores(
    made: dict[str, Any], config: ReproduceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (config.output / "table-ablation" / "target.json").unlink()

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("fitted or collected again")

    monkeypatch.setattr(workbench, "collect_activations", refuse)
    monkeypatch.setattr(workbench, "fit_edit_from_activations", refuse)
    ((_, again),) = reproduce("table-ablation", config, overwrite=True)
    assert again is not None
    assert again.rows == made["table-ablation"].rows  # type: ignore[union-attr]


def test_a_target_that_fails_does_not_stop_the_others(config: ReproduceConfig, tmp_path: Path) -> None:
    empty = tmp_path / "data"
    empty.mkdir()
    (empty / "halueval_qa").symlink_to(Path(str(config.data_dir)) / "halueval_qa")
    few = config.replace(output=tmp_path / "out", data_dir=empty, demonstrations={"halueval_qa": 8})
    found = dict(reproduce("figure-spectrum", few)) | dict(reproduce("table-crows", few))
    assert isinstance(found["figure-spectrum"], Drawing)
    assert "bbq" in str(found["table-crows"])
    assert isinstance(found["table-crows"], SealignError)
    assert not (tmp_path / "out" / "table-crows").exists()


def test_unknown_targets_get_a_suggestion() -> None:
    with pytest.raises(SettingError, match="did you mean 'table-bbq'"):
        chosen_targets("table-bqb")
    with pytest.raises(SettingError, match="limit is 1, but it must be at least 2; try 60"):
        ReproduceConfig(output=Path("x"), limit=1)
