"""Paired statistics of the edited model against the base model: differences, intervals, p-values, Holm's correction.

Scores are arrays of shape (items,): one number per item, for the same items in both arms. The *units* of resampling
are the items, or the groups if ``groups`` gives a label per item, such as its question: items of one group are not
independent. All functions have these settings:

- groups: Labels of any type, (items,), with at least 2 distinct values; None makes each item a unit.
- confidence: Confidence level of the interval, in (0, 1).
- resamples: Number of resamples of the bootstrap and of the permutation test. Must be at least 100.
- seed: Seed of the resampling. Must be at least 0; the same seed and inputs give the same result.

The interval is the *expanded percentile* bootstrap (Hesterberg 2015, The American Statistician 69(4)): G of G units
are drawn with replacement, and the interval has the quantiles a and 1 - a of the resampled metric as its ends, with
a = Phi(-sqrt(G / (G - 1)) t_{G-1}((1 + confidence) / 2)). This corrects the plain percentiles, which are too narrow in
small samples. For ratios G is the number of units with a denominator above 0, in the arm that has fewer.

Coverage of 95 % intervals over 4,000 simulated sets of each kind (standard error at most 0.005), measured by
benchmarks/interval_coverage.py:

| data | expanded percentile | percentile | BCa | bootstrap-t |
| --- | --- | --- | --- | --- |
| 60 pairs of 0/1, 5 % gained, 5 % lost | 0.951 | 0.950 | 0.917 | 0.885 |
| 60 pairs of 0/1, 8 % gained, 2 % lost | 0.931 | 0.929 | 0.918 | 0.918 |
| 20 normal | 0.952 | 0.928 | 0.929 | 0.953 |
| 60 exponential | 0.935 | 0.927 | 0.929 | 0.947 |
| 60 log-normal | 0.918 | 0.911 | 0.912 | 0.934 |
| 25 groups of 1 to 8 normal items | 0.941 | 0.924 | 0.920 | 0.944 |

Bootstrap-t is better on skewed scores. On 0/1 scores, the main use, it has the lowest coverage (in the second row
together with BCa), and 11 to 12 % of its intervals are unbounded. If the groups of the last row are ignored, the
expanded percentile interval covers 0.70. The permutation test is exact if base and edited are exchangeable without an
effect; on skewed differences it rejects slightly too often.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import special

from sealign.errors import SettingError
from sealign.evaluation.resampling import (
    FloatArray,
    Plan,
    bootstrap_interval,
    check_denominators,
    is_binary,
    mcnemar_p_value,
    ratio_gap,
    score_columns,
    standard_error,
    sum_by_unit,
    swap_p_value,
)

Aim = Literal["higher", "lower"] | float | None
"""Which values of a metric are good: higher ones, lower ones, those near a target, or None for no preference."""


def gain(base: float, edited: float, aim: Aim) -> float:
    """Return how much a metric improves from the base model to the edited model; 0 if it has no aim.

    Args:
        base: Value of the base model.
        edited: Value of the edited model.
        aim: Which values are good.

    Example:
        >>> gain(0.25, 0.5, "lower"), gain(0.25, 0.5, 0.5)
        (-0.25, 0.25)
    """
    if aim is None:
        return 0.0
    if isinstance(aim, str):
        return edited - base if aim == "higher" else base - edited
    return abs(base - aim) - abs(edited - aim)


@dataclass(frozen=True)
class Difference:
    """The difference of a metric between the base model and the edited model, over the same items.

    Attributes:
        base: Metric of the base model.
        edited: Metric of the edited model.
        difference: edited - base.
        low: Lower end of the bootstrap interval of ``difference``.
        high: Upper end of the bootstrap interval of ``difference``.
        items: Number of items.
        groups: Number of groups, or None if the items were the units.
        p_value: Two-sided p-value of no difference between the arms, in (0, 1].
        test: ``"mcnemar"`` for 0/1 scores without groups, else ``"permutation"``.
        smallest_detectable: Smallest true difference that this number of units detects with power 0.8 at the two-sided
            level 0.05, (z_0.975 + z_0.8) SE = 2.80 SE, with SE the standard error of ``difference`` over the units;
            None if all units have the same difference, so that SE cannot be estimated.
    """

    base: float
    edited: float
    difference: float
    low: float
    high: float
    items: int
    groups: int | None
    p_value: float
    test: Literal["mcnemar", "permutation"]
    smallest_detectable: float | None

    def gain(self, aim: Aim = "higher") -> float:
        """Return how much the metric improves; 0 if it has no aim."""
        return gain(self.base, self.edited, aim)


@dataclass(frozen=True)
class MeanInterval:
    """The mean of one arm with its bootstrap interval.

    Attributes:
        mean: Mean over the items.
        low, high: Ends of the interval.
        items: Number of items.
        groups: Number of groups, or None if the items were the units.
    """

    mean: float
    low: float
    high: float
    items: int
    groups: int | None


def paired_difference(
    base: npt.ArrayLike,
    edited: npt.ArrayLike,
    *,
    groups: npt.ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Return the mean difference of paired scores with its interval, p-value and smallest detectable difference.

    difference = sum_i (edited_i - base_i) / items. For 0/1 scores without groups, the p-value is from McNemar's exact
    test: the two-sided binomial probability, at 1/2, of the number of items gained among all that changed. Otherwise,
    the two scores of an item, or of all items of a group together, are swapped at random, and
    p = (1 + number of swaps with a |difference| at least as large) / (1 + resamples), or the exact fraction of such
    swaps if there are no more possible swaps than resamples.

    If all units differ by the same amount m, then low = high = m. For 0/1 scores, which might have differed otherwise,
    the interval is m - u (m + 1) to m + u (1 - m) instead, with the exact bound
    u = 1 - ((1 - confidence) / 2)^(1 / units) on the fraction of units that do.

    Args:
        base: Scores of the base model, (items,), finite.
        edited: Scores of the edited model on the same items in the same order, (items,), finite.
        groups, confidence, resamples, seed: As described for the module.

    Raises:
        SettingError: Lengths differ, a score is not finite, there are fewer than 2 units, or a setting is out of range.

    Example:
        >>> result = paired_difference([0, 0, 0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0])
        >>> result.difference, result.p_value, result.test
        (0.625, 0.125, 'mcnemar')
    """
    plan = Plan(confidence, resamples, seed)
    before, after = score_columns(base=base, edited=edited)
    change, ones = after - before, np.ones_like(before)
    rows = sum_by_unit([np.zeros_like(ones), ones, change, ones], groups)
    binary = is_binary(before) and is_binary(after)
    result = _compare(rows, plan, len(ones), groups is not None, reach=(-1.0, 1.0) if binary else None)
    result = replace(result, base=float(before.mean()), edited=float(after.mean()))
    if groups is None and binary:
        return replace(result, p_value=mcnemar_p_value(change), test="mcnemar")
    return result


def ratio_difference(
    base: tuple[npt.ArrayLike, npt.ArrayLike],
    edited: tuple[npt.ArrayLike, npt.ArrayLike],
    *,
    scale: float = 1.0,
    offset: float = 0.0,
    groups: npt.ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Return the difference of a ratio metric; each arm is a pair (numerators, denominators).

    metric = scale * sum_i numerator_i / sum_i denominator_i + offset. The bias score of BBQ has scale 2 and offset -1,
    with the numerator "answer agrees with the bias" and the denominator "answer is not unknown". Both sums are computed
    again for each resample of items or groups. For the p-value, the pairs of the two arms are swapped as in
    ``paired_difference``; SE is the standard error of the linearised metric. A resample in which a denominator sums to
    0 is left out of the interval; a swap in which one does counts as extreme, so that p is rather too large. If no unit
    changes the metric, then low = high.

    Args:
        base: (numerators, denominators) of the base model, (items,) each, finite; denominators at least 0.
        edited: (numerators, denominators) of the edited model on the same items in the same order.
        scale: Factor of the ratio, finite and not 0.
        offset: Constant that is added to the scaled ratio; it does not change the difference.
        groups, confidence, resamples, seed: As described for the module.

    Raises:
        SettingError: As for ``paired_difference``; a denominator is below 0, fewer than 5 units of an arm have one
            above 0, or ``scale`` is 0.

    Example:
        >>> answered = [1, 1, 1, 1, 1, 1, 0, 1]
        >>> biased, less = [1, 1, 1, 1, 1, 1, 0, 0], [1, 0, 1, 0, 1, 0, 0, 0]
        >>> result = ratio_difference((biased, answered), (less, answered))
        >>> round(result.base, 3), round(result.edited, 3), result.p_value
        (0.857, 0.429, 0.25)
    """
    plan = Plan(confidence, resamples, seed)
    if not (np.isfinite(scale) and np.isfinite(offset) and scale != 0):
        raise SettingError(
            f"scale is {scale} and offset is {offset}, but both must be finite and scale not 0; "
            "leave them at 1 and 0 for the plain ratio"
        )
    columns = score_columns(
        base_numerator=base[0],
        base_denominator=base[1],
        edited_numerator=edited[0],
        edited_denominator=edited[1],
    )
    columns[0], columns[2] = scale * columns[0], scale * columns[2]
    rows = sum_by_unit(columns, groups)
    check_denominators(columns, rows)
    result = _compare(rows, plan, len(columns[0]), groups is not None)
    return replace(result, base=result.base + offset, edited=result.edited + offset)


def mean_interval(
    values: npt.ArrayLike,
    *,
    groups: npt.ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> MeanInterval:
    """Return the mean over the items, sum_i values_i / items, with its bootstrap interval.

    If all units have the same mean m, then low = high = m. For 0/1 values the interval is m - u m to m + u (1 - m)
    instead, with u as in ``paired_difference``.

    Args:
        values: Scores of one arm, (items,), finite.
        groups, confidence, resamples, seed: As described for the module.

    Raises:
        SettingError: A value is not finite, there are fewer than 2 units, or a setting is out of range.

    Example:
        >>> mean_interval([1.0, 1.0, 1.0, 1.0])
        MeanInterval(mean=1.0, low=0.397..., high=1.0, items=4, groups=None)
    """
    plan = Plan(confidence, resamples, seed)
    (scores,) = score_columns(values=values)
    ones = np.ones_like(scores)
    rows = sum_by_unit([np.zeros_like(ones), ones, scores, ones], groups)
    low, high = bootstrap_interval(rows, plan, reach=(0.0, 1.0) if is_binary(scores) else None)
    units = None if groups is None else len(rows)
    return MeanInterval(float(scores.mean()), low, high, items=len(scores), groups=units)


def holm(p_values: npt.ArrayLike) -> FloatArray:
    """Return p-values adjusted by Holm's method, which controls the probability of any false discovery.

    With p_(1) <= ... <= p_(m), adjusted_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)) (Holm 1979, Scandinavian Journal
    of Statistics 6). The order of the p-values is kept.

    Args:
        p_values: P-values in [0, 1], (m,); m may be 0.

    Raises:
        SettingError: A p-value is outside [0, 1] or NaN, or the array is not one-dimensional.

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(6).tolist()
        [0.03, 0.06, 0.06]
    """
    given = np.asarray(p_values, dtype=np.float64)
    if given.ndim != 1:
        raise SettingError(f"p_values has {given.ndim} dimensions, but it must have 1; flatten it")
    outside = given[~((given >= 0) & (given <= 1))]
    if outside.size:
        raise SettingError(f"p_values contains {outside[0]}, but each must be in [0, 1]; leave out failed tests")
    order = np.argsort(given, kind="stable")
    stepped = np.minimum(1.0, np.arange(len(given), 0, -1) * given[order])
    adjusted = np.empty_like(given)
    adjusted[order] = np.maximum.accumulate(stepped)
    return adjusted


def _compare(
    rows: FloatArray, plan: Plan, items: int, grouped: bool, reach: tuple[float, float] | None = None
) -> Difference:
    """Return the comparison of the two ratios of (units, 4) sums, with the permutation test."""
    total = rows.sum(axis=0)
    low, high = bootstrap_interval(rows, plan, reach)
    error = standard_error(rows)
    return Difference(
        base=float(total[0] / total[1]),
        edited=float(total[2] / total[3]),
        difference=float(ratio_gap(total)),
        low=low,
        high=high,
        items=items,
        groups=len(rows) if grouped else None,
        p_value=swap_p_value(rows, plan),
        test="permutation",
        smallest_detectable=float((special.ndtri(0.975) + special.ndtri(0.8)) * error) if error else None,
    )
