"""Statistics of whole evaluations, on results with planted effects."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from sealign.errors import ResultsFileError
from sealign.evaluation.comparison import compare_results, mean_scores, report_edits
from sealign.evaluation.results import Results
from sealign.evaluation.statistics import holm, paired_difference, ratio_difference
from tests.evaluation_data import planted_results


def test_a_planted_gain_helps_within_the_budget_and_beyond_random() -> None:
    (report,) = report_edits(planted_results(0.05))
    assert report.verdict.word == "helps"
    assert "truthfulqa_mc2 mc2 +0.049 [+0.0" in report.verdict.sentence
    assert report_edits(planted_results(0.05, rise=0.2))[0].verdict.word == "harms"
    assert report_edits(planted_results(0.05, rise=0.2), max_damage=0.3)[0].verdict.word == "helps"
    assert report_edits(planted_results(0.05, random_gain=0.05))[0].verdict.word == "no evidence"
    assert report_edits(planted_results(-0.05))[0].verdict.word == "harms"
    assert report_edits(planted_results(0.0))[0].verdict.word == "no evidence"


def test_rows_are_the_statistics_of_their_arms() -> None:
    results = planted_results(0.03)
    (report,) = report_edits(results, seed=3)
    rows = {row.name: row for row in report.rows}
    metric = results.tasks["truthfulqa_mc2"].metrics["mc2"]
    base, edited = (metric.item_scores(arm).numerators for arm in ("base", "mild"))
    random = np.mean([metric.item_scores(f"mild random {n}").numerators for n in (0, 1)], axis=0)
    mc2 = rows["truthfulqa_mc2 mc2"]
    assert mc2.difference == paired_difference(base, edited, seed=3)
    assert mc2.random == paired_difference(base, random, seed=3)
    assert mc2.over_random == paired_difference(random, edited, seed=3)
    assert mc2.reversed == paired_difference(base, metric.item_scores("mild reversed").numerators, seed=3)
    bias = results.tasks["bbq"].metrics["bias"]
    pairs = [(bias.arms[arm].numerators, bias.arms[arm].denominators) for arm in ("base", "mild")]
    groups = results.tasks["bbq"].groups
    expected = ratio_difference(*pairs, scale=2.0, offset=-1.0, groups=groups, seed=3)  # type: ignore[arg-type]
    assert rows["bbq bias"].difference == expected
    assert expected.groups == 20
    assert set(report.damage) == {"mild", "mild random 0", "mild random 1", "mild reversed"}


def test_families_of_the_correction() -> None:
    (report,) = report_edits(planted_results(0.01))
    headlines = report.headlines
    assert [row.name for row in headlines] == ["truthfulqa_mc2 mc2", "bbq acc", "bbq bias"]
    raw = [row.difference.p_value for row in headlines if row.difference]
    assert [row.adjusted_p for row in headlines] == holm(raw).tolist()
    age, religion = (row for row in report.rows if "/" in row.metric)
    assert age.difference is not None
    assert age.adjusted_p == age.difference.p_value  # alone in its family
    # A single item has no interval, and says so by having none.
    assert religion.difference is None
    assert religion.adjusted_p is None
    assert religion.base in (0.0, 1.0)


def test_the_mean_of_ratios_averages_numerators_and_denominators() -> None:
    bias = planted_results().tasks["bbq"].metrics["bias"]
    one = bias.item_scores("base")
    other = dataclasses.replace(one, numerators=one.numerators * 0, denominators=np.ones_like(one.numerators))
    mean = mean_scores([one, other])
    assert mean.denominators is not None
    assert one.denominators is not None
    share = one.numerators.sum() / (one.denominators.sum() + len(one.numerators))
    assert mean.value == pytest.approx(2 * share - 1)


def _renamed(results: Results, name: str) -> Results:
    """Return results with another name for the edit."""
    arms = {}
    for old, arm in results.arms.items():
        arms[old.replace("mild", name)] = dataclasses.replace(arm, edit=arm.edit and name)
    tasks = {
        task: dataclasses.replace(
            found,
            metrics={
                metric: dataclasses.replace(scores, arms={a.replace("mild", name): s for a, s in scores.arms.items()})
                for metric, scores in found.metrics.items()
            },
        )
        for task, found in results.tasks.items()
    }
    damage = {old.replace("mild", name): record for old, record in results.damage.items()}
    return dataclasses.replace(results, arms=arms, tasks=tasks, damage=damage)


def test_two_evaluations() -> None:
    first, second = planted_results(0.0), _renamed(planted_results(0.04), "strong")
    base, edits = compare_results(first, second)
    assert (base.first, base.second) == ("base", "base")
    assert all(row.difference is None or row.difference.difference == 0 for row in base.rows)
    assert (edits.first, edits.second) == ("mild", "strong")
    mc2 = next(row for row in edits.rows if row.metric == "mc2")
    assert mc2.difference is not None
    assert mc2.difference.difference == pytest.approx(0.04, abs=1e-9)
    assert mc2.adjusted_p is not None
    assert mc2.adjusted_p < 0.01


def test_only_items_that_both_have_are_compared() -> None:
    whole, part = planted_results(items=80), planted_results(items=80)
    task = part.tasks["truthfulqa_mc2"]
    metric = task.metrics["mc2"]
    cut = {arm: dataclasses.replace(scores, numerators=scores.numerators[:30]) for arm, scores in metric.arms.items()}
    shorter = dataclasses.replace(
        task,
        questions=task.questions[:30],
        metrics={"mc2": dataclasses.replace(metric, items=list(range(30)), arms=cut)},
    )
    (base, *_) = compare_results(whole, dataclasses.replace(part, tasks={"truthfulqa_mc2": shorter}))
    assert [row.difference.items for row in base.rows if row.difference] == [30]


def test_evaluations_of_other_tasks_or_data_are_refused() -> None:
    first, second = planted_results(), planted_results()
    alone = dataclasses.replace(second, tasks={"other": second.tasks["bbq"]})
    with pytest.raises(
        ResultsFileError, match="have no task in common: one has truthfulqa_mc2, bbq, the other has other; eval"
    ):
        compare_results(first, alone)
    second.tasks["bbq"].questions[2] = "something else"
    with pytest.raises(
        ResultsFileError,
        match="item 2 of task 'bbq' differs between the evaluations .*'who was it, 2.*'something else'",
    ):
        compare_results(first, second)


def test_scores_that_are_not_finite() -> None:
    results = planted_results(0.05)
    metrics = results.tasks["truthfulqa_mc2"].metrics["mc2"], results.tasks["bbq"].metrics["bias"]
    for metric in metrics:
        metric.arms["mild"].numerators[3:5] = [None, None]
    (report,) = report_edits(results)
    rows = {row.name: row for row in report.rows}
    for name in ("truthfulqa_mc2 mc2", "bbq bias"):
        row = rows[name]
        assert (row.difference, row.over_random, row.broken, row.missing) == (None, None, 2, "not finite in 2 items")
        assert np.isnan(row.edited)
        assert row.random is not None
    assert rows["bbq acc/Religion"].missing == "too few items for an interval"
    assert report.verdict.word == "broken"
    assert report.verdict.sentence == "Broken: NaN or infinite numbers in truthfulqa_mc2 mc2 and bbq bias."
    base, edited = compare_results(planted_results(0.05), results)
    assert [row.broken for row in base.rows] == [0] * len(base.rows)
    assert [row.broken for row in edited.rows if row.headline] == [2, 0, 2]


def test_a_random_control_that_is_not_finite_is_left_out() -> None:
    results = planted_results(0.05)
    arms = results.tasks["truthfulqa_mc2"].metrics["mc2"].arms
    arms["mild random 0"].numerators[:] = [None] * 80
    (report,) = report_edits(results)
    row = report.headlines[0]
    assert row.random == paired_difference(arms["base"].numerators, arms["mild random 1"].numerators)  # type: ignore[arg-type]
    assert report.verdict.word == "helps"
    arms["mild random 1"].numerators[0] = None
    (report,) = report_edits(results)
    assert report.headlines[0].random is None
    assert "has no random control" in report.verdict.sentence


@pytest.mark.parametrize("kind", ["damage", "domain_damage"])
def test_a_loss_that_is_not_finite_is_broken(kind: str) -> None:
    results = planted_results(0.05)
    records = {name: dataclasses.replace(record, edited=list(record.edited)) for name, record in results.damage.items()}
    records["mild"].edited[1] = None
    changed: dict[str, Any] = {kind: records}
    (report,) = report_edits(dataclasses.replace(results, **changed))
    assert report.verdict.word == "broken"
