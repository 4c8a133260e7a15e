"""Tuning: a planted behaviour is found and proved, an absent one is not; on tiny models and local data."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import pytest

import sealign
from sealign.demonstrations.splits import split_demonstrations
from sealign.errors import SettingError
from sealign.evaluation.tuning import TuneResult, tune
from sealign.evaluation.tuning_config import TuneConfig
from tests.conftest import our_hooks
from tests.evaluation.planted import planted_demonstrations, planted_model
from tests.evaluation_data import HARNESS_WARNINGS, write_truthfulqa

pytestmark = HARNESS_WARNINGS

QUICK = TuneConfig(methods=["mean_difference", "difference_operator"], tokens=["completion"], finalists=2)


@pytest.fixture(scope="module")
def planted(tokenizer: Any) -> Any:
    return planted_model(len(tokenizer))


@pytest.fixture(scope="module")
def found(planted: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[TuneResult, Path]:
    folder = tmp_path_factory.mktemp("tuned")
    items = planted_demonstrations(80)
    return tune(planted, tokenizer, items, config=QUICK, output=folder, command="as typed"), folder


def test_a_planted_behaviour_helps(found: tuple[TuneResult, Path], planted: Any) -> None:
    result, folder = found
    assert our_hooks(planted) == 0
    assert result.winner is not None
    assert result.edit is not None
    assert result.report is not None
    assert result.report.verdict.word == "helps", result.report.verdict.sentence
    margin = next(row for row in result.report.rows if row.metric == "preference_margin")
    assert margin.difference is not None
    assert margin.difference.low > 0
    assert margin.reversed is not None
    assert margin.reversed.high < 0
    # The scan predicts the divergence at full strength.
    assert result.winner.room == pytest.approx(1.12, abs=0.25)
    for damages in (result.report.damage, result.report.domain_damage):
        assert damages["winner"].mean_divergence < 1.5 * QUICK.max_damage  # of other texts than it was chosen on
    assert sealign.Edit.from_pretrained(folder / "edit").hash == result.edit.hash


def test_the_winner_is_refitted_on_all_but_the_test(
    found: tuple[TuneResult, Path], planted: Any, tokenizer: Any
) -> None:
    result, _ = found
    assert result.winner is not None
    assert result.edit is not None
    assert result.results is not None
    searched, tested = split_demonstrations(planted_demonstrations(80), holdout=QUICK.holdout)
    again = sealign.fit_edit(planted, tokenizer, searched, config=result.winner.scanned.candidate.config)
    assert again.with_strength(result.edit.strength).hash == result.edit.hash
    assert result.edit.record.fitted_on == [item.hash for item in searched]
    assert result.results.tasks["preference"].questions == [item.prompt for item in tested]
    assert list(result.results.arms) == [
        "base", "winner", "winner random 0", "winner random 1", "winner random 2", "winner reversed",
    ]  # fmt: skip


def test_every_candidate_is_in_the_scan(found: tuple[TuneResult, Path]) -> None:
    result, folder = found
    with (folder / "scan.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = {
        (method, site, str(layer), "completion")
        for method in QUICK.methods
        for site in ("residual", "mlp", "attention")
        for layer in range(4)
    }
    single = [row for row in rows if not row["layer_weights"]]
    assert {(row["method"], row["site"], row["layers"], row["token"]) for row in single} == expected
    assert len(single) == len(expected)
    assert all(len(row["layers"].split()) == len(row["layer_weights"].split()) > 1 for row in rows if row not in single)
    bounds = [float(row["efficiency_bound"]) for row in rows]
    assert bounds == sorted(bounds, reverse=True)
    assert [each.candidate.edit.method for each in result.scanned] == [row["method"] for row in rows]


def test_an_absent_behaviour_is_no_evidence(planted: Any, tokenizer: Any, tmp_path: Path) -> None:
    """With the sides exchanged at random, nothing is wanted: at most one of ten searches may say otherwise."""
    config = QUICK.replace(methods=["mean_difference"], sites=["residual"], finalists=1)
    words = []
    for seed in range(10):
        items = planted_demonstrations(24, seed, shuffled=True)
        result = tune(planted, tokenizer, items, config=config, output=tmp_path / str(seed))
        words.append("none" if result.report is None else result.report.verdict.word)
    assert words.count("helps") <= 1, words


def test_tasks_in_place_of_the_preference(planted: Any, tokenizer: Any, tmp_path: Path) -> None:
    write_truthfulqa(tmp_path / "data", count=16)
    config = QUICK.replace(
        tasks=["truthfulqa_mc2"], data_dir=tmp_path / "data", sites=["residual"], layers="2,3", finalists=2
    )
    result = tune(planted, tokenizer, planted_demonstrations(24), config=config, output=tmp_path / "out")
    assert [len(finalist.gains) for finalist in result.finalists] == [1] * len(result.finalists)
    if result.results is not None:
        assert len(result.results.tasks["truthfulqa_mc2"].questions) == 5  # 30 % of 16 items
        assert "preference" in result.results.tasks
    with pytest.raises(SettingError, match="has 3 items, of which 2 can be compared and 1 tested"):
        tune(planted, tokenizer, planted_demonstrations(24), config=config.replace(limit=3), output=tmp_path / "few")


def test_deployable_candidates_are_loras(planted: Any, tokenizer: Any, tmp_path: Path) -> None:
    config = TuneConfig(tokens=["completion"], layers="1,2", finalists=1, deployable=True)
    result = tune(planted, tokenizer, planted_demonstrations(20), config=config, output=tmp_path)
    kinds = {(each.candidate.method, each.candidate.edit.site) for each in result.scanned}
    assert kinds == {
        (method, site) for method in ("difference_operator", "targeted_shift", "sea") for site in ("mlp", "attention")
    }
    for each in result.scanned:
        assert each.candidate.edit.normalization == "none"
        assert all(own.constant_part() is None for own in each.candidate.edit.affine_edits.values())
    with pytest.raises(SettingError, match="no candidate is left; search more methods or sites"):
        tune(
            planted,
            tokenizer,
            planted_demonstrations(20),
            config=config.replace(methods=["mean_difference"]),
            output=tmp_path / "none",
        )


def test_every_method_can_be_searched(planted: Any, tokenizer: Any, tmp_path: Path) -> None:
    config = TuneConfig(
        methods=["difference_operator", "mean_difference", "sea", "leace", "iti"],
        sites=["attention"],
        tokens=["last"],
        layers="1,2",
        finalists=1,
    )
    result = tune(planted, tokenizer, planted_demonstrations(20), config=config, output=tmp_path)
    counts: dict[str, int] = {}
    for each in result.scanned:
        counts[each.candidate.method] = counts.get(each.candidate.method, 0) + 1
    # SEA has two settings; ITI's layers belong together.
    assert counts == {"difference_operator": 2, "mean_difference": 2, "sea": 4, "leace": 2, "iti": 1}


def test_each_round_of_a_scan_is_shown(planted: Any, tokenizer: Any, tmp_path: Path) -> None:
    config = QUICK.replace(methods=["mean_difference"], sites=["residual"], max_minutes=60)
    rounds: list[list[tuple[list[int], float]]] = []
    result = tune(
        planted,
        tokenizer,
        planted_demonstrations(20),
        config=config,
        output=tmp_path,
        on_round=lambda scanned: rounds.append([(each.candidate.edit.layers, each.efficiency) for each in scanned]),
    )
    assert [[layers for layers, _ in each] for each in rounds] == [[[2]], [[0]], [[1], [3]]]
    alone = [each for each in result.scanned if len(each.candidate.edit.layers) == 1]
    shown = sorted(itertools.chain.from_iterable(rounds))
    assert shown == sorted((each.candidate.edit.layers, each.efficiency) for each in alone)


def test_too_few_demonstrations(planted: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="5 demonstrations are split into 2 to fit, 2 to compare and 1 to test"):
        tune(planted, tokenizer, planted_demonstrations(5), config=QUICK, output=tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ["leaky"]}, "unknown method 'leaky'"),
        ({"methods": []}, "at least 1 name"),
        ({"sites": ["mlp", "mlp"]}, "named 2 times"),
        ({"layers": "signature:3"}, "choose them by position"),
        ({"max_damage": 0}, "above 0|greater than 0"),
        ({"holdout": 1.0}, "holdout"),
    ],
)
def test_settings_are_checked(changes: Any, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        TuneConfig(**changes)
