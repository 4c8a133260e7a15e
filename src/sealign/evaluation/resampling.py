"""Arithmetic of paired statistics: sums by unit, bootstrap intervals and permutation tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from sealign.errors import SettingError

FloatArray = npt.NDArray[np.float64]

MIN_RESAMPLES = 100
"""Smallest number of resamples; with fewer, the quantiles of a 95 % interval are close to the extremes."""

MIN_DENOMINATORS = 5
"""Smallest number of units with a denominator above 0; then less than exp(-5) = 0.7 % of resamples have none."""

BLOCK_CELLS = 200_000
"""Number of resamples times units in one block, which is small enough for the cache of the processor."""

ROUNDING = 1e-10
"""Differences below this fraction of the size of the scores are treated as rounding errors."""


@dataclass(frozen=True)
class Plan:
    """Settings of the resampling.

    Attributes:
        confidence: Confidence level of the interval, in (0, 1).
        resamples: Number of resamples and of random swaps. Must be at least 100.
        seed: Seed of both. Must be at least 0.

    Raises:
        SettingError: A value is out of range.
    """

    confidence: float
    resamples: int
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise SettingError(f"confidence is {self.confidence}, but it must be in (0, 1); try 0.95")
        if self.resamples < MIN_RESAMPLES:
            raise SettingError(f"resamples is {self.resamples}, but it must be at least {MIN_RESAMPLES}; try 10000")
        if self.seed < 0:
            raise SettingError(f"seed is {self.seed}, but it must be at least 0; use 0")


def score_columns(**named: npt.ArrayLike) -> list[FloatArray]:
    """Return arrays as float64, after checking that all have the shape (items,) and are finite.

    Args:
        **named: Scores by name; the name is used in messages.

    Raises:
        SettingError: An array has another shape, or a score is NaN or infinite.
    """
    columns = {name: np.asarray(values, dtype=np.float64) for name, values in named.items()}
    first, *_ = columns
    for name, column in columns.items():
        if column.ndim != 1:
            raise SettingError(f"{name} has {column.ndim} dimensions, but it must have 1; pass one score for each item")
        if len(column) != len(columns[first]):
            raise SettingError(
                f"{name} has {len(column)} items, but it must have {len(columns[first])} like {first}; "
                "score both models on the same items"
            )
        bad = np.flatnonzero(~np.isfinite(column))
        if bad.size:
            raise SettingError(
                f"{name} is {column[bad[0]]} at item {bad[0]}, but every score must be finite; "
                "leave that item out of both arms"
            )
    return list(columns.values())


def sum_by_unit(columns: list[FloatArray], groups: npt.ArrayLike | None) -> FloatArray:
    """Return the sums of columns over each unit, (units, columns).

    Args:
        columns: Arrays of shape (items,).
        groups: Label of each item; None makes each item a unit.

    Raises:
        SettingError: There are fewer than 2 units, or not one label per item.
    """
    rows = np.stack(columns, axis=1)
    if groups is not None:
        labels = np.asarray(groups)
        if labels.shape != (len(rows),):
            raise SettingError(
                f"groups has shape {labels.shape}, but it must be ({len(rows)},); give one label for each item"
            )
        distinct, codes = np.unique(labels, return_inverse=True)
        rows = np.stack([np.bincount(codes, column, minlength=len(distinct)) for column in columns], axis=1)
    if len(rows) < 2:
        unit = "items" if groups is None else "groups"
        raise SettingError(f"there are {len(rows)} {unit}, but an interval needs at least 2; evaluate more {unit}")
    return rows


def check_denominators(columns: list[FloatArray], rows: FloatArray) -> None:
    """Raise an error if the denominators of a ratio are below 0, or above 0 in too few units.

    Args:
        columns: Numerators and denominators of the base arm, then of the edited arm, (items,) each.
        rows: The same summed over units, (units, 4).

    Raises:
        SettingError: The message names the arm.
    """
    for arm, index in (("base", 1), ("edited", 3)):
        lowest = columns[index].min()
        if lowest < 0:
            raise SettingError(
                f"a denominator of the {arm} arm is {lowest}, but it must be at least 0; negate both numbers"
            )
        used = int((rows[:, index] > 0).sum())
        if used < MIN_DENOMINATORS:
            raise SettingError(
                f"the {arm} arm has a denominator above 0 in {used} units, but the ratio needs at least "
                f"{MIN_DENOMINATORS}; evaluate more items, or compare the numerators with paired_difference"
            )


def is_binary(scores: FloatArray) -> bool:
    """Return whether all scores are 0 or 1."""
    return bool(np.isin(scores, (0.0, 1.0)).all())


def ratio_gap(sums: FloatArray) -> FloatArray:
    """Return the difference of the two ratios of (..., 4) sums; NaN where a denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(sums[..., 1::2] > 0, sums[..., 0::2] / sums[..., 1::2], np.nan)
    return np.asarray(ratios[..., 1] - ratios[..., 0])


def _size(rows: FloatArray) -> float:
    """Return the size of the scores, relative to which rounding is judged."""
    total = np.abs(rows).sum(axis=0)
    return float(total[0] / total[1] + total[2] / total[3])


def standard_error(rows: FloatArray) -> float:
    """Return SE = sqrt(G / (G - 1) sum_g v_g^2), with v_g the influence of unit g on the linearised metric.

    For means of single items it is the standard deviation of the differences over sqrt(items).

    Args:
        rows: Sums over units, (units, 4).
    """
    base_sum, base_weight, edited_sum, edited_weight = rows.sum(axis=0)
    influence = (rows[:, 2] - rows[:, 3] * (edited_sum / edited_weight)) / edited_weight
    influence -= (rows[:, 0] - rows[:, 1] * (base_sum / base_weight)) / base_weight
    units = len(rows)
    error = float(np.sqrt(units / (units - 1) * np.square(influence).sum()))
    return error if error > ROUNDING * _size(rows) else 0.0


def bootstrap_interval(rows: FloatArray, plan: Plan, reach: tuple[float, float] | None = None) -> tuple[float, float]:
    """Return the expanded percentile interval of the difference; see ``sealign.evaluation.statistics``.

    Args:
        rows: Sums over units, (units, 4).
        plan: Settings of the resampling.
        reach: Range of the difference of a 0/1 metric; None if it is unknown.
    """
    tail = (1 - plan.confidence) / 2
    if standard_error(rows) == 0:
        middle = float(ratio_gap(rows.sum(axis=0)))
        unseen = 0.0 if reach is None else 1 - tail ** (1 / len(rows))
        lowest, highest = (middle, middle) if reach is None else reach
        return middle - unseen * (middle - lowest), middle + unseen * (highest - middle)
    draws = ratio_gap(np.concatenate(list(_resampled_sums(rows, plan))))
    units = min(int((rows[:, 1] > 0).sum()), int((rows[:, 3] > 0).sum()))
    quantile = np.sqrt(units / (units - 1)) * special.stdtrit(units - 1, tail)
    expanded = float(special.ndtr(quantile))
    low, high = np.quantile(draws[np.isfinite(draws)], [expanded, 1 - expanded])
    return float(low), float(high)


def _resampled_sums(rows: FloatArray, plan: Plan) -> Iterator[FloatArray]:
    """Yield blocks of sums over units that are drawn with replacement, (block, columns)."""
    rng = np.random.default_rng([plan.seed, 0])
    units = len(rows)
    block = max(1, BLOCK_CELLS // units)
    for start in range(0, plan.resamples, block):
        size = min(block, plan.resamples - start)
        drawn = rng.integers(units, size=(size, units)) + np.arange(size)[:, None] * units
        counts = np.bincount(drawn.ravel(), minlength=size * units).reshape(size, units)
        yield counts @ rows


def swap_p_value(rows: FloatArray, plan: Plan) -> float:
    """Return the two-sided p-value of the permutation test that swaps the arms within units.

    It is exact if there are no more possible swaps than resamples.

    Args:
        rows: Sums over units, (units, 4).
        plan: Settings of the resampling.
    """
    total, gap = rows.sum(axis=0), rows[:, 2:] - rows[:, :2]
    gap = gap[(gap != 0).any(axis=1)]  # swapping equal arms changes nothing
    moves = np.concatenate([gap, -gap], axis=1)
    exact = 2 ** len(gap) <= plan.resamples
    threshold = abs(float(ratio_gap(total))) - ROUNDING * _size(rows)
    patterns = _all_swaps(len(gap)) if exact else _random_swaps(len(gap), plan)
    extreme, tried = 0, 0
    for swaps in patterns:
        swapped = np.abs(ratio_gap(total + swaps @ moves))
        extreme += int((np.isnan(swapped) | (swapped >= threshold)).sum())
        tried += len(swapped)
    return extreme / tried if exact else (1 + extreme) / (1 + tried)


def _all_swaps(units: int) -> Iterator[FloatArray]:
    block = max(1, BLOCK_CELLS // max(1, units))
    for start in range(0, 2**units, block):
        numbers = np.arange(start, min(start + block, 2**units))
        yield ((numbers[:, None] >> np.arange(units)) & 1).astype(np.float64)


def _random_swaps(units: int, plan: Plan) -> Iterator[FloatArray]:
    rng = np.random.default_rng([plan.seed, 1])
    block = max(1, BLOCK_CELLS // units)
    for start in range(0, plan.resamples, block):
        size = min(block, plan.resamples - start)
        octets = rng.integers(256, size=(size, -(-units // 8)), dtype=np.uint8)
        yield np.unpackbits(octets, axis=1, count=units).astype(np.float64)


def mcnemar_p_value(change: FloatArray) -> float:
    """Return the exact two-sided p-value of McNemar's test; 1 if nothing changed.

    Args:
        change: Change of each item, (items,).
    """
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    return float(stats.binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0
