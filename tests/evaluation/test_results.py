"""Results files: written atomically, read strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sealign.errors import ResultsFileError
from sealign.evaluation.damage import Damage
from sealign.evaluation.item_scores import ItemScores
from sealign.evaluation.results import DamageRecord, Results, Scores
from tests.evaluation_data import planted_results


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    results = planted_results(0.1)
    path = results.save(tmp_path)
    assert path.name == "results.json"
    assert Results.load(tmp_path) == Results.load(path) == results
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_values_and_arms() -> None:
    results = planted_results()
    assert results.edits == ["mild"]
    assert results.controls("mild", "random") == ["mild random 0", "mild random 1"]
    assert results.controls("mild", "reversed") == ["mild reversed"]
    bias = results.tasks["bbq"].metrics["bias"]
    scores = bias.item_scores("mild")
    assert scores.denominators is not None
    assert bias.value("mild") == pytest.approx(2 * sum(scores.numerators) / sum(scores.denominators) - 1)


def test_damage_is_restored_from_its_record() -> None:
    damage = Damage(np.array([3.0, 1.0]), np.array([1.0, 2.0]), np.array([1.5, 2.0]), np.array([0.1, 0.2]))
    record = DamageRecord.of(damage)
    assert record.damage.loss_increase == damage.loss_increase == pytest.approx(0.375)
    assert record.damage.mean_divergence == damage.mean_divergence


def _break(folder: Path, change: Any) -> None:
    data = json.loads((folder / "results.json").read_text())
    change(data)
    (folder / "results.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda data: data.update(format="other"),
            "is not a sealign.results file: its 'format' is 'other'; check the path",
        ),
        (
            lambda data: data.update(format_version=4),
            "format version 4, but this version of Sealign reads version 3; upgrade",
        ),
        (lambda data: data.update(format_version=1), "version 1, .* version 3; run the evaluation again with this"),
        (lambda data: data.update(surprise=1), "unknown key 'surprise'"),
        (lambda data: data.pop("arms"), "no key 'arms'"),
        (lambda data: data["arms"]["mild"].pop("method"), "no key 'arms.mild.method'"),
        (
            lambda data: data["tasks"]["bbq"]["metrics"]["acc"].update(scale="1"),
            "'1' at key 'tasks.bbq.metrics.acc.scale', which must be a valid number",
        ),
    ],
)
def test_changed_files_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    planted_results().save(tmp_path)
    _break(tmp_path, change)
    with pytest.raises(ResultsFileError, match=words):
        Results.load(tmp_path)


def test_missing_and_truncated_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsFileError, match="there are no results at .*; give the folder or file"):
        Results.load(tmp_path)
    path = planted_results().save(tmp_path)
    path.write_text(path.read_text()[:1000])
    with pytest.raises(ResultsFileError, match="is not JSON"):
        Results.load(tmp_path)


def test_scores_that_are_not_finite_are_null(tmp_path: Path) -> None:
    scores = ItemScores(np.arange(3), np.array([0.5, np.nan, -np.inf]))
    damage = Damage(*np.array([[3.0, 4.0], [1.0, 2.0], [np.inf, 2.5], [np.nan, 0.1]]))
    results = planted_results()
    results.tasks["bbq"].metrics["bias"].arms["mild"] = Scores.of(scores)
    results.damage["mild"] = DamageRecord.of(damage)
    path = results.save(tmp_path)
    data = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert data["tasks"]["bbq"]["metrics"]["bias"]["arms"]["mild"]["numerators"] == [0.5, None, None]
    assert data["damage"]["mild"]["edited"] == [None, 2.5]
    loaded = Results.load(tmp_path)
    assert loaded == results
    assert str(loaded.damage["mild"].damage.edited_loss) == str(loaded.damage["mild"].damage.perplexity_ratio) == "nan"


def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    results = planted_results()
    results.tasks["bbq"].metrics["acc"].arms["mild"].numerators[0] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
