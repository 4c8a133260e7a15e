"""Cells of tables, computed from the results of evaluations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sealign.errors import SettingError
from sealign.evaluation.comparison import difference_of, item_groups
from sealign.evaluation.item_scores import ItemScores
from sealign.evaluation.results import BASE, Results
from sealign.evaluation.statistics import mean_interval, ratio_difference
from sealign.reproduce.table_format import Cell

LEVEL = 0.05
"""Largest p-value at which a cell is marked as different from the reference row."""


def metric_cell(results: Results, task: str, metric: str, arm: str, *, seed: int = 0) -> Cell:
    """Return one metric of one arm with its bootstrap interval, marked if it differs from the base model.

    The p-value is from the paired test and is not corrected for the number of cells in a table.

    Args:
        results: Results of an evaluation.
        task, metric, arm: Names of the task, the metric and the arm.
        seed: Seed of the resampling.
    """
    found = results.tasks[task]
    if metric not in found.metrics:
        return Cell(missing=" ".join(found.notes) or f"{task} has no {metric}")
    scores = found.metrics[metric].item_scores(arm)
    groups = item_groups(found, scores)
    low, high = _interval(scores, groups, seed)
    value = scores.value
    if np.isnan(value):
        return Cell(missing=f"{metric} applies to no item of {task}")
    cell = Cell(value, low, high)
    if arm == BASE:
        return cell
    difference = difference_of(found.metrics[metric].item_scores(BASE), scores, groups=groups, seed=seed)
    return cell if difference is None else replace(cell, differs=difference.p_value <= LEVEL)


def _interval(scores: ItemScores, groups: list[str] | None, seed: int) -> tuple[float | None, float | None]:
    try:
        if scores.denominators is None:
            found = mean_interval(scores.numerators, groups=groups, seed=seed)
            return found.low, found.high
        # The difference from a ratio of 0, whose value is the offset in every resample.
        ones = np.ones_like(scores.numerators)
        gap = ratio_difference(
            (0 * ones, ones), (scores.numerators, scores.denominators), scale=scores.scale, groups=groups, seed=seed
        )
        return scores.offset + gap.low, scores.offset + gap.high
    except SettingError:
        return None, None  # too few items for an interval


def damage_cell(results: Results, arm: str, *, seed: int = 0) -> Cell:
    """Return the damage of one arm in nats per token, weighted by tokens, with its interval over texts.

    Args:
        results: Results of an evaluation.
        arm: Name of the arm.
        seed: Seed of the resampling.
    """
    if arm == BASE:
        return Cell(0.0)
    damage = results.damage[arm].damage
    tokens = damage.tokens
    try:
        gap = ratio_difference((damage.base * tokens, tokens), (damage.edited * tokens, tokens), seed=seed)
    except SettingError:
        return Cell(damage.loss_increase)  # too few texts for an interval
    return Cell(gap.difference, gap.low, gap.high)
