"""Cells of tables against the statistics they are computed from."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student

from sealign.evaluation.results import DamageRecord
from sealign.evaluation.statistics import mean_interval, paired_difference
from sealign.reproduce.cells import damage_cell, metric_cell
from tests.evaluation_data import planted_results


def test_a_mean_has_its_bootstrap_interval() -> None:
    results = planted_results(gain=0.05)
    cell = metric_cell(results, "truthfulqa_mc2", "mc2", "mild")
    metric = results.tasks["truthfulqa_mc2"].metrics["mc2"]
    values = {arm: np.array(metric.arms[arm].numerators) for arm in ("base", "mild")}
    expected = mean_interval(values["mild"])
    assert (cell.value, cell.low, cell.high) == (expected.mean, expected.low, expected.high)
    assert cell.differs is (paired_difference(values["base"], values["mild"]).p_value <= 0.05)
    assert cell.differs is True
    assert metric_cell(results, "truthfulqa_mc2", "mc2", "base").differs is None


def test_a_ratio_is_on_its_own_scale() -> None:
    results = planted_results()
    metric = results.tasks["bbq"].metrics["bias"].item_scores("mild")
    assert metric.denominators is not None
    expected = 2 * metric.numerators.sum() / metric.denominators.sum() - 1
    cell = metric_cell(results, "bbq", "bias", "mild")
    assert cell.value == pytest.approx(expected)
    assert cell.low is not None
    assert cell.high is not None
    assert -1 <= cell.low < expected < cell.high <= 1
    # Resampled by group, against a plain resampling of whole groups in float64.
    groups = np.array(results.tasks["bbq"].groups)
    names = np.unique(groups)
    generator = np.random.default_rng(1)
    sums = np.array(
        [[metric.numerators[groups == name].sum(), metric.denominators[groups == name].sum()] for name in names]
    )
    drawn = sums[generator.integers(len(names), size=(4000, len(names)))].sum(1)
    units = len(names)
    # The expanded percentile interval, for few groups (Hesterberg 2015, section 5.4.1).
    expanded = norm.cdf(np.sqrt(units / (units - 1)) * student.ppf(0.025, units - 1))
    low, high = np.quantile(2 * drawn[:, 0] / drawn[:, 1] - 1, [expanded, 1 - expanded])
    assert cell.low == pytest.approx(low, abs=0.02)
    assert cell.high == pytest.approx(high, abs=0.02)


def test_missing_values_have_a_reason() -> None:
    results = planted_results()
    assert metric_cell(results, "bbq", "truth", "mild").missing == "Something was left out"
    assert metric_cell(results, "truthfulqa_mc2", "truth", "mild").missing == "truthfulqa_mc2 has no truth"
    single = metric_cell(results, "bbq", "acc/Religion", "mild")
    assert single.value is not None
    assert single.low is None  # one item has no interval


def test_damage_is_weighted_by_tokens() -> None:
    results = planted_results(rise=0.25)
    assert damage_cell(results, "base").value == 0
    cell = damage_cell(results, "mild")
    assert cell.value == pytest.approx(0.25)
    assert cell.low is None  # two texts have no interval
    base, rise = np.linspace(2, 3, 7), np.linspace(-0.1, 0.5, 7)
    tokens = np.arange(3.0, 10.0)
    record = DamageRecord(tokens.tolist(), base.tolist(), (base + rise).tolist(), [0.1] * 7)
    cell = damage_cell(dataclasses.replace(results, damage={"mild": record}), "mild")
    assert cell.value == pytest.approx((tokens * rise).sum() / tokens.sum())
    assert cell.low is not None
    assert cell.high is not None
    assert cell.value is not None
    assert cell.low < cell.value < cell.high
