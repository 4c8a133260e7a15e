"""The table of behaviours: rows of a tiny model, figures against its own results, missing sources and continuation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from sealign.demonstrations.bundled import neutral_texts
from sealign.evaluation import search, strength_choice
from sealign.evaluation.results import Results
from sealign.evaluation.search import Search
from sealign.reproduce import behaviour_table
from sealign.reproduce.reproduce_config import ReproduceConfig
from sealign.reproduce.table_format import Table
from sealign.reproduce.targets import reproduce
from tests.evaluation_data import HARNESS_WARNINGS
from tests.tiny_models import build_model

METHODS = ("difference_operator", "sea", "iti")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), *HARNESS_WARNINGS]


@pytest.fixture(scope="module")
def config(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> ReproduceConfig:
    folder = tmp_path_factory.mktemp("model")
    build_model("llama", vocab_size=len(tokenizer), num_hidden_layers=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ReproduceConfig(
        output=tmp_path_factory.mktemp("out"),
        model=str(folder),
        data_dir=tmp_path_factory.mktemp("empty"),
        behaviours=["bundled:positivity", "crows_pairs"],
        pairs=17,
        dtype="float32",
    )


@pytest.fixture(scope="module", autouse=True)
def few_texts() -> Iterator[None]:
    """Fewer methods, texts and answers, since nothing here depends on their number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(behaviour_table, "METHODS", METHODS)
        patch.setattr(search, "neutral_texts", lambda: neutral_texts()[:4])
        patch.setattr(strength_choice, "ANSWERED_PROMPTS", 3)
        yield


@pytest.fixture(scope="module")
def table(config: ReproduceConfig) -> Table:
    ((_, found),) = reproduce("behaviours", config)
    assert isinstance(found, Table)
    return found


def test_every_method_has_a_row(table: Table, config: ReproduceConfig) -> None:
    rows = [name.removeprefix(f"{config.model}, ") for name in table.rows]
    places = [row.split(", ", 1)[1].split(" at ") for row in rows[:-1]]
    assert sorted(method for method, _ in places) == sorted(METHODS)
    assert all(row.startswith("positivity, ") for row in rows[:-1])
    verdicts = {place.rsplit(": ", 1)[1] for _, place in places}
    assert verdicts <= {"helps", "no evidence", "harms"}
    assert rows[-1] == "crows_pairs"
    assert "crows_pairs" in table.rows[f"{config.model}, crows_pairs"][0].missing


def test_figures_are_those_of_the_results(table: Table, config: ReproduceConfig) -> None:
    (folder,) = (config.output / "work" / "behaviours").iterdir()
    results = Results.load(folder / "evaluation")
    margins = results.tasks["preference"].metrics["preference_margin"]
    accuracy = results.tasks["preference"].metrics["preference_accuracy"]
    assert len(margins.items) == 6  # about 30 % of 17, by topics
    checked = 0
    for name, cells in table.rows.items():
        if "crows_pairs" in name:
            continue
        method = name.split(", ", 2)[2].split(" at ")[0]
        shown: dict[str, Any] = {column.name: cell for column, cell in zip(table.columns, cells, strict=True)}
        arms: dict[str, Any] = {
            arm: np.array(margins.arms[arm].numerators) for arm in ("base", method, f"{method} random 0")
        }
        assert shown["margin of base"].value == pytest.approx(arms["base"].mean())
        gain = float((arms[method] - arms["base"]).mean())
        assert shown["gain"].value == pytest.approx(gain)
        assert shown["gain"].low <= gain <= shown["gain"].high
        assert shown["gain over random directions"].value == pytest.approx(
            float((arms[method] - arms[f"{method} random 0"]).mean())
        )
        assert shown["accuracy %"].value == pytest.approx(accuracy.value(method))
        damage, domain = (record[method].damage.mean_divergence for record in (results.damage, results.domain_damage))
        assert shown["KL, neutral text"].value == pytest.approx(damage)
        assert shown["efficiency"].value == pytest.approx(gain / math.sqrt(2 * max(damage, domain)))
        assert max(damage, domain) < 0.1  # the budget is 0.05, on other texts
        checked += 1
    assert checked == len(METHODS)


@pytest.mark.usefixtures("table")
def test_it_continues_without_another_search(
    table: Table, config: ReproduceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Search) -> Any:
        raise AssertionError("searched again")

    monkeypatch.setattr(Search, "scan", refuse)
    (config.output / "behaviours" / "target.json").unlink()
    ((_, again),) = reproduce("behaviours", config, overwrite=True)
    assert isinstance(again, Table)
    assert again.rows == table.rows


def test_the_page_has_the_table(table: Table, config: ReproduceConfig) -> None:
    page = Path(config.output / "behaviours" / "behaviours.md").read_text()
    assert all(name in page for name in table.rows)
