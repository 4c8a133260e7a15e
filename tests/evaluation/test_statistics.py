"""Planted effects and planted nulls: intervals cover, p-values are uniform, Holm is Holm."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sealign.errors import SealignError, SettingError
from sealign.evaluation.statistics import holm, mean_interval, paired_difference, ratio_difference

QUICK: dict[str, Any] = {"resamples": 999}


def paired_binary(rng, gained, lost, items=60):
    kind = rng.choice(4, p=[gained, lost, (1 - gained - lost) / 2, (1 - gained - lost) / 2], size=items)
    return np.isin(kind, (1, 2)).astype(float), np.isin(kind, (0, 2)).astype(float)


def grouped_scores(rng, effect=0.0, groups=25):
    labels = np.repeat(np.arange(groups), rng.integers(1, 9, size=groups))
    base = rng.normal(size=len(labels))
    shared = rng.normal(size=groups)[labels]
    return base, base + effect + shared + 0.5 * rng.normal(size=len(labels)), labels


def ratio_arms(rng, base_rate, edited_rate, items=60):
    position, chance = rng.random(items), rng.random(items)
    base_used = position < 0.5
    edited_used = position + 0.1 * rng.normal(size=items) < 0.5
    return (
        (base_used & (chance < base_rate), base_used),
        (edited_used & (chance < edited_rate), edited_used),
    )


def share_covering(truth, results):
    # Resampled 0/1 means lie on a grid, so an end that equals the truth may miss it by rounding.
    return np.mean([result.low - 1e-9 <= truth <= result.high + 1e-9 for result in results])


def assert_binomial(share, repeats, lowest, highest):
    """Check that a share may come from a probability in [lowest, highest], with one false alarm in a thousand."""
    assert stats.binom.ppf(5e-4, repeats, lowest) / repeats <= share
    assert share <= stats.binom.ppf(1 - 5e-4, repeats, highest) / repeats


# Intervals


@pytest.mark.parametrize(("gained", "lost", "lowest"), [(0.05, 0.05, 0.94), (0.08, 0.02, 0.92), (0.3, 0.1, 0.94)])
def test_interval_of_binary_pairs_covers(gained, lost, lowest):
    rng = np.random.default_rng(11)
    results = [paired_difference(*paired_binary(rng, gained, lost), seed=i, **QUICK) for i in range(500)]
    assert_binomial(share_covering(gained - lost, results), 500, lowest, 0.965)


@pytest.mark.parametrize(("confidence", "items"), [(0.95, 20), (0.8, 33)])
def test_interval_of_normal_differences_covers(confidence, items):
    rng = np.random.default_rng(12)
    results = []
    for i in range(600):
        base = rng.normal(size=items)
        edited = base + 0.4 + rng.normal(size=items)
        results.append(paired_difference(base, edited, confidence=confidence, seed=i, **QUICK))
    assert_binomial(share_covering(0.4, results), 600, confidence - 0.01, confidence + 0.01)


def test_groups_cover_and_ignoring_them_does_not():
    rng = np.random.default_rng(13)
    sets = [grouped_scores(rng, effect=0.3) for _ in range(400)]
    using = [paired_difference(b, e, groups=g, seed=i, **QUICK) for i, (b, e, g) in enumerate(sets)]
    ignoring = [paired_difference(b, e, seed=i, **QUICK) for i, (b, e, _) in enumerate(sets)]
    assert_binomial(share_covering(0.3, using), 400, 0.93, 0.96)
    assert share_covering(0.3, ignoring) < 0.75
    arms = [mean_interval(e - b, groups=g, seed=i, **QUICK) for i, (b, e, g) in enumerate(sets[:5])]
    assert [(a.low, a.high) for a in arms] == [(u.low, u.high) for u in using[:5]]


def test_interval_of_a_ratio_covers():
    rng = np.random.default_rng(14)
    arms = [ratio_arms(rng, 0.7, 0.55) for _ in range(500)]
    results = [
        ratio_difference(base, edited, scale=2, offset=-1, seed=i, **QUICK) for i, (base, edited) in enumerate(arms)
    ]
    assert_binomial(share_covering(2 * (0.55 - 0.7), results), 500, 0.935, 0.965)


@pytest.mark.parametrize(("rate", "lowest", "highest"), [(0.3, 0.94, 0.97), (0.97, 0.95, 1.0)])
def test_interval_of_one_arm_covers(rate, lowest, highest):
    rng = np.random.default_rng(15)
    results = [mean_interval(rng.random(60) < rate, seed=i, **QUICK) for i in range(500)]
    assert_binomial(share_covering(rate, results), 500, lowest, highest)


def test_interval_is_the_expanded_percentile_of_scipy():
    scores = np.random.default_rng(16).exponential(size=9)
    tail = stats.norm.cdf(math.sqrt(9 / 8) * stats.t.ppf(0.025, 8))
    expected = stats.bootstrap(
        (scores,), np.mean, confidence_level=1 - 2 * tail, n_resamples=100_000, method="percentile", rng=1
    ).confidence_interval
    found = mean_interval(scores, resamples=100_000)
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.02)


def test_ratio_resamples_both_sums():
    rng = np.random.default_rng(17)
    base, edited = ratio_arms(rng, 0.7, 0.4, items=40)
    edited = edited[0] & (np.arange(40) < 20), edited[1] & (np.arange(40) < 20)
    draws = []
    for _ in range(20_000):
        drawn = rng.integers(40, size=40)
        if not (base[1][drawn].any() and edited[1][drawn].any()):
            continue
        draws.append(edited[0][drawn].sum() / edited[1][drawn].sum())
        draws[-1] -= base[0][drawn].sum() / base[1][drawn].sum()
    units = min(base[1].sum(), edited[1].sum())
    tail = stats.norm.cdf(math.sqrt(units / (units - 1)) * stats.t.ppf(0.025, units - 1))
    found = ratio_difference(base, edited, resamples=20_000)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, [tail, 1 - tail])), abs=0.02)


# p-values


def test_mcnemar_is_the_binomial_test_and_conservative():
    for discordant, level in itertools.product(range(14), (0.01, 0.05, 0.1, 0.3, 0.7)):
        rejected = 0.0
        for gained in range(discordant + 1):
            base = np.array([0] * gained + [1] * (discordant - gained) + [0, 1, 1])
            edited = np.array([1] * gained + [0] * (discordant - gained) + [0, 1, 1])
            result = paired_difference(base, edited, resamples=100)
            tail = sum(math.comb(discordant, j) for j in range(min(gained, discordant - gained) + 1))
            assert result.test == "mcnemar"
            assert result.p_value == pytest.approx(min(1.0, 2 * tail / 2**discordant))
            if discordant:
                assert result.p_value == stats.binomtest(gained, discordant, 0.5).pvalue
            rejected += math.comb(discordant, gained) / 2**discordant * (result.p_value <= level)
        assert rejected <= level


def test_permutation_of_binary_pairs_is_mcnemar():
    base, edited = paired_binary(np.random.default_rng(20), 0.15, 0.05, items=45)
    mcnemar = paired_difference(base, edited, resamples=2**15)
    permutation = paired_difference(base, edited, groups=np.arange(45), resamples=2**15)
    assert (mcnemar.test, permutation.test) == ("mcnemar", "permutation")
    assert (mcnemar.groups, permutation.groups) == (None, 45)
    assert permutation.p_value == pytest.approx(mcnemar.p_value)
    assert (permutation.low, permutation.high) == (mcnemar.low, mcnemar.high)


@pytest.mark.parametrize("items", [9, 41])
def test_permutation_agrees_with_scipy(items):
    rng = np.random.default_rng(21)
    base = rng.normal(size=items)
    edited = base + 0.3 + 0.8 * rng.normal(size=items)
    expected = stats.permutation_test(
        (base, edited),
        lambda x, y, axis: np.mean(y - x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=1,
    ).pvalue
    tolerance = 1e-12 if items == 9 else 0.015
    assert paired_difference(base, edited, resamples=20_000).p_value == pytest.approx(expected, abs=tolerance)


def test_groups_are_swapped_whole():
    rng = np.random.default_rng(22)
    base, edited, labels = grouped_scores(rng, effect=0.5, groups=7)
    sums = np.array([(edited - base)[labels == label].sum() for label in range(7)])
    flips = np.array(list(itertools.product([-1, 1], repeat=7)))
    expected = np.mean(np.abs(flips @ sums) >= abs(sums.sum()) - 1e-9)
    names = np.array([f"question {label}" for label in labels])
    assert paired_difference(base, edited, groups=names).p_value == pytest.approx(expected)


def test_ratio_swaps_pairs_within_items():
    rng = np.random.default_rng(23)
    used = rng.integers(1, 4, size=(2, 8)).astype(float)
    arms = np.stack([rng.random((2, 8)) * used, used], axis=1)  # (arm, numerator or denominator, item)
    observed = arms.sum(axis=2)
    observed = observed[1, 0] / observed[1, 1] - observed[0, 0] / observed[0, 1]
    extreme = 0
    for swap in itertools.product([False, True], repeat=8):
        sums = np.where(swap, arms[::-1], arms).sum(axis=2)
        extreme += abs(sums[1, 0] / sums[1, 1] - sums[0, 0] / sums[0, 1]) >= abs(observed) - 1e-9
    found = ratio_difference(tuple(arms[0]), tuple(arms[1]), resamples=300)
    assert found.p_value == pytest.approx(extreme / 2**8)
    assert found.difference == pytest.approx(observed)


def test_p_values_are_uniform_without_an_effect():
    rng = np.random.default_rng(24)
    p_values: dict[str, list[float]] = {"items": [], "groups": [], "ratio": []}
    for i in range(500):
        base, edited = rng.exponential(size=(2, 20))  # skewed, but exchangeable
        p_values["items"].append(paired_difference(base, edited, seed=i, **QUICK).p_value)
        shared = rng.normal(size=12).repeat(3)
        edited = rng.normal(size=36) + shared
        result = paired_difference(np.zeros(36), edited, groups=np.arange(36) // 3, seed=i, **QUICK)
        p_values["groups"].append(result.p_value)
        numerators, denominators = rng.exponential(size=(2, 15)), rng.random((2, 15))
        first, second = zip(numerators, denominators, strict=True)
        result = ratio_difference(first, second, seed=i, **QUICK)
        p_values["ratio"].append(result.p_value)
    for kind, values in p_values.items():
        assert stats.kstest(values, "uniform").pvalue > 0.001, kind


def test_p_value_is_small_for_a_planted_effect_and_never_zero():
    base = np.random.default_rng(25).normal(size=50)
    result = paired_difference(base, base + 3, **QUICK)
    assert result.p_value == 1 / 1000


# Smallest detectable difference


def test_smallest_detectable_is_found_with_power_0_8():
    rng = np.random.default_rng(30)
    effect = (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) / math.sqrt(50)
    results = []
    for i in range(400):
        base = rng.normal(size=50)
        results.append(paired_difference(base, base + effect + rng.normal(size=50), seed=i, **QUICK))
    assert np.mean([result.smallest_detectable for result in results]) == pytest.approx(effect, rel=0.03)
    assert_binomial(np.mean([result.p_value <= 0.05 for result in results]), 400, 0.77, 0.82)


def test_smallest_detectable_is_the_equation():
    rng = np.random.default_rng(31)
    base, edited, labels = grouped_scores(rng)
    factor = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    change = edited - base
    found = paired_difference(base, edited, **QUICK).smallest_detectable
    assert found == pytest.approx(factor * stats.sem(change))
    residuals = np.bincount(labels, change - change.mean())
    error = math.sqrt(25 / 24 * np.square(residuals).sum()) / len(change)
    found = paired_difference(base, edited, groups=labels, **QUICK).smallest_detectable
    assert found == pytest.approx(factor * error)


# What is degenerate


def test_constant_difference_of_continuous_scores_is_its_own_interval():
    base = np.random.default_rng(40).normal(size=30)
    result = paired_difference(base, base + 0.1, **QUICK)
    assert result.low == result.high == pytest.approx(0.1)
    assert result.smallest_detectable is None
    same = paired_difference(base, base, **QUICK)
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    flat = mean_interval([0.25, 0.25, 0.25])
    assert flat.mean == flat.low == flat.high == 0.25


def test_binary_scores_that_do_not_vary_get_the_exact_bound():
    bound = 1 - stats.binomtest(30, 30).proportion_ci(0.95, method="exact").low
    arm = mean_interval(np.ones(30))
    assert (arm.low, arm.high) == pytest.approx((1 - bound, 1.0))
    arm = mean_interval(np.zeros(30))
    assert (arm.low, arm.high) == pytest.approx((0.0, bound))
    scores = np.arange(30) % 2
    unchanged = paired_difference(scores, scores)
    assert (unchanged.low, unchanged.high, unchanged.p_value) == pytest.approx((-bound, bound, 1.0))
    assert unchanged.smallest_detectable is None
    gained = paired_difference(np.zeros(30), np.ones(30))
    assert (gained.low, gained.high) == pytest.approx((1 - 2 * bound, 1.0))


def test_resamples_without_a_denominator_are_left_out():
    used = np.array([1.0] * 5 + [0.0] * 45)
    base = used * np.random.default_rng(41).random(50) * 0.1
    result = ratio_difference((base, used), (used, used), resamples=20_000)
    assert 0.9 <= result.low < result.difference < result.high <= 1
    same = ratio_difference((base, used), (base[::-1], used[::-1]), resamples=2000)
    assert (same.difference, same.p_value) == (0, 1)
    assert -0.1 <= same.low < 0 < same.high <= 0.1


def test_swaps_without_a_denominator_count_as_extreme():
    base = np.array([1.0] * 5 + [0.0] * 5)
    edited = base[::-1]
    result = ratio_difference((base, base), (0.5 * edited, edited), resamples=2000)
    ratios = []
    for swap in itertools.product([False, True], repeat=10):
        first = np.where(swap, edited, base).sum(), np.where(swap, 0.5 * edited, base).sum()
        second = np.where(swap, base, edited).sum(), np.where(swap, base, 0.5 * edited).sum()
        both = first[0] and second[0]
        ratios.append(second[1] / second[0] - first[1] / first[0] if both else math.inf)
    assert result.p_value == np.mean(np.abs(ratios) >= 0.5 - 1e-9)


# Invariances

arms = st.integers(2, 12).flatmap(
    lambda items: st.tuples(*[st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=items, max_size=items)] * 2)
)
binary_arms = st.integers(2, 12).flatmap(
    lambda items: st.tuples(*[st.lists(st.integers(0, 1), min_size=items, max_size=items)] * 2)
)
few = settings(max_examples=60, deadline=None)


@few
@given(st.one_of(arms, binary_arms), st.booleans())
def test_swapping_the_arms_mirrors_everything(pair, grouped):
    base, edited = pair
    groups = np.arange(len(base)) // 2 if grouped and len(base) > 2 else None
    there = paired_difference(base, edited, groups=groups, resamples=300)
    back = paired_difference(edited, base, groups=groups, resamples=300)
    assert (back.base, back.edited) == (there.edited, there.base)
    assert (-back.difference, -back.high, -back.low) == pytest.approx(
        (there.difference, there.low, there.high), abs=1e-9
    )
    assert back.p_value == there.p_value
    assert back.smallest_detectable == pytest.approx(there.smallest_detectable)


@few
@given(arms, st.integers(-1000, 1000), st.sampled_from([0.25, 2.0, 8.0]))
def test_shift_and_scale_move_the_result_along(pair, shift, scale):
    base, edited = (np.array(arm) + 1 / 64 for arm in pair)  # never 0/1
    plain = paired_difference(base, edited, groups=np.arange(len(base)), resamples=300)
    moved = paired_difference(scale * base + shift, scale * edited + shift, groups=np.arange(len(base)), resamples=300)
    assert moved.base == pytest.approx(scale * plain.base + shift)
    expected = (scale * plain.difference, scale * plain.low, scale * plain.high, plain.p_value)
    assert (moved.difference, moved.low, moved.high, moved.p_value) == pytest.approx(expected, abs=1e-9)


@few
@given(arms, st.integers(-20, 20))
def test_a_shift_of_the_edited_arm_shifts_the_interval(pair, shift):
    base, edited = (np.array(arm) + 0.125 for arm in pair)  # never 0/1
    plain = paired_difference(base, edited, resamples=300)
    moved = paired_difference(base, edited + shift, resamples=300)
    expected = (plain.difference + shift, plain.low + shift, plain.high + shift)
    assert (moved.difference, moved.low, moved.high) == pytest.approx(expected, abs=1e-8)
    assert 0 < moved.p_value <= 1


def test_ratio_with_ones_is_the_paired_difference():
    rng = np.random.default_rng(50)
    base, edited, labels = grouped_scores(rng, effect=0.2)
    ones = np.ones(len(base))
    ratio = ratio_difference((base, ones), (edited, ones), groups=labels, scale=2, offset=-1)
    paired = paired_difference(base, edited, groups=labels)
    assert (ratio.base, ratio.edited) == pytest.approx((2 * paired.base - 1, 2 * paired.edited - 1))
    assert (ratio.low, ratio.high) == pytest.approx((2 * paired.low, 2 * paired.high))
    assert paired.smallest_detectable is not None
    assert ratio.smallest_detectable == pytest.approx(2 * paired.smallest_detectable)
    assert (ratio.p_value, ratio.items, ratio.groups) == (paired.p_value, paired.items, 25)


def test_a_negative_scale_mirrors_the_ratio():
    base, edited = ratio_arms(np.random.default_rng(51), 0.8, 0.5)
    plain = ratio_difference(base, edited, **QUICK)
    mirrored = ratio_difference(base, edited, scale=-1, **QUICK)
    assert (-mirrored.high, -mirrored.low) == pytest.approx((plain.low, plain.high))
    assert mirrored.p_value == plain.p_value


def test_a_seed_reproduces_and_another_differs():
    base, edited, labels = grouped_scores(np.random.default_rng(52))
    edited += 0.4
    copies = base.copy(), edited.copy(), labels.copy()
    first, again, other = (paired_difference(base, edited, groups=labels, seed=s, **QUICK) for s in (3, 3, 4))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)
    assert 0.001 < first.p_value != other.p_value
    assert all(np.array_equal(a, b) for a, b in zip(copies, (base, edited, labels), strict=True))


def test_memory_stays_bounded():
    base, edited = np.random.default_rng(53).normal(size=(2, 5000))
    tracemalloc.start()
    try:
        result = paired_difference(base, edited)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.items == 5000
    assert peak < 50e6


# Holm


def test_holm_by_hand():
    # sorted: 0.005 * 4 = 0.02, 0.01 * 3 = 0.03, 0.03 * 2 = 0.06, 0.04 * 1 = 0.04 raised to 0.06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]).tolist() == [1.0, 1.0]
    assert holm([]).tolist() == []


@few
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_the_step_down_test(p_values):
    given_values = np.array(p_values)
    adjusted = holm(given_values)
    order = np.argsort(given_values, kind="stable")
    assert (np.diff(adjusted[order]) >= 0).all()
    assert (adjusted >= given_values).all()
    assert (adjusted <= 1).all()
    for level in (0.0101, 0.0503, 0.2007):
        rejected = np.zeros(len(p_values), dtype=bool)
        for step, index in enumerate(order):  # stop at the first that is not rejected
            if given_values[index] * (len(p_values) - step) > level:
                break
            rejected[index] = True
        assert ((adjusted <= level) == rejected).all()


def test_holm_controls_the_familywise_error():
    p_values = np.random.default_rng(60).random((3000, 7))
    false = np.mean([holm(row).min() <= 0.05 for row in p_values])
    assert_binomial(false, 3000, 0.045, 0.05)


# Errors

FIVE = [0.1, 0.2, 0.3, 0.4, 0.5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_difference(FIVE, FIVE[:4]), "edited has 4 items, but it must have 5 like base"),
        (lambda: paired_difference([0.1], [0.2]), "there are 1 items, but an interval needs at least 2"),
        (lambda: paired_difference([], []), "there are 0 items"),
        (lambda: paired_difference(FIVE, FIVE, groups=["a"] * 5), "there are 1 groups"),
        (lambda: paired_difference(FIVE, FIVE, groups=["a"] * 4), r"groups has shape \(4,\).*\(5,\)"),
        (lambda: paired_difference([0.1, math.nan], [1, 2]), "base is nan at item 1"),
        (lambda: paired_difference([0.1, 0.2], [math.inf, 2]), "edited is inf at item 0"),
        (lambda: paired_difference(np.ones((2, 3)), np.ones((2, 3))), "base has 2 dimensions"),
        (lambda: paired_difference(FIVE, FIVE, confidence=1.0), r"confidence is 1.0.*\(0, 1\).*0.95"),
        (lambda: paired_difference(FIVE, FIVE, resamples=10), "resamples is 10.*at least 100.*10000"),
        (lambda: paired_difference(FIVE, FIVE, seed=-1), "seed is -1.*at least 0"),
        (lambda: mean_interval([1.0]), "there are 1 items"),
        (lambda: mean_interval([1.0, math.nan]), "values is nan at item 1"),
        (lambda: ratio_difference((FIVE, FIVE), (FIVE, FIVE[:3])), "edited_denominator has 3 items"),
        (lambda: ratio_difference((FIVE, FIVE), (FIVE, [1, 1, 1, 1, -1])), "of the edited arm is -1.0"),
        (lambda: ratio_difference((FIVE, [1, 1, 1, 1, 0]), (FIVE, FIVE)), "the base arm .* in 4 units"),
        (lambda: ratio_difference((FIVE, FIVE), (FIVE, FIVE), scale=0), "scale is 0 and offset is 0.0"),
        (lambda: holm([0.5, 1.5]), r"p_values contains 1.5, but each must be in \[0, 1\]"),
        (lambda: holm([0.5, math.nan]), "p_values contains nan"),
        (lambda: holm([[0.5]]), "p_values has 2 dimensions"),
    ],
)
def test_errors_name_the_value_the_bound_and_the_remedy(call, message):
    with pytest.raises(SettingError, match=message) as caught:
        call()
    assert isinstance(caught.value, SealignError)
    assert "; " in str(caught.value)


def test_importing_statistics_imports_no_model_library():
    code = "import sys, sealign.evaluation.statistics; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
