"""Measure the coverage of 95 % intervals of a mean paired difference: that of Sealign and three others.

Sets of six kinds of data with a known true mean are simulated, and four intervals are computed from each: "expanded",
the interval of ``sealign.evaluation.statistics.paired_difference``; the plain percentile bootstrap and BCa of
``scipy``; and bootstrap-t. The script prints the share of sets whose interval contains the true mean, for the last kind
also with its groups ignored, and the share of bootstrap-t intervals with an infinite end.

    OMP_NUM_THREADS=1 python benchmarks/interval_coverage.py [--sets 4000] [--resamples 2000] [--seed 0] [--json FILE]

The defaults (4,000 sets, 2,000 resamples) take about 4 minutes on one core. The same seed gives the same shares.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy import stats

from sealign.evaluation.statistics import paired_difference

Array = npt.NDArray[np.float64]
Interval = tuple[float, float]
Scores = tuple[Array, Array, npt.NDArray[np.int64] | None]  # base, edited, and the group of each item
Draw = Callable[[np.random.Generator], Scores]

TAIL, SLACK = 0.025, 1e-12  # the ends for 0/1 data may equal the true mean, which rounding must not decide


def binary(gained: float, lost: float) -> Draw:
    def draw(rng: np.random.Generator) -> Scores:
        change = rng.choice([1.0, -1.0, 0.0], size=60, p=[gained, lost, 1 - gained - lost])
        base = np.where(change == 0, rng.integers(2, size=60), change < 0).astype(np.float64)
        return base, base + change, None

    return draw


def grouped(rng: np.random.Generator) -> Scores:
    labels = np.repeat(np.arange(25), rng.integers(1, 9, size=25))
    edited = rng.standard_normal(25)[labels] + rng.standard_normal(len(labels))
    return np.zeros_like(edited), edited, labels


KINDS: dict[str, tuple[Draw, float]] = {
    "60 pairs of 0/1, 5 % gained, 5 % lost": (binary(0.05, 0.05), 0.0),
    "60 pairs of 0/1, 8 % gained, 2 % lost": (binary(0.08, 0.02), 0.06),
    "20 normal": (lambda rng: (np.zeros(20), rng.standard_normal(20), None), 0.0),
    "60 exponential": (lambda rng: (np.zeros(60), rng.standard_exponential(60), None), 1.0),
    "60 log-normal": (lambda rng: (np.zeros(60), rng.lognormal(size=60), None), np.exp(0.5)),
    "25 groups of 1 to 8 normal items": (grouped, 0.0),
    "the same sets, groups ignored": (lambda rng: (*grouped(rng)[:2], None), 0.0),
}


def mean(sums: Array, sizes: Array, axis: int = -1) -> Array:
    """Return the mean over the items of units, given by their sums and sizes."""
    return np.asarray(sums.sum(axis) / sizes.sum(axis))


def standard_error(sums: Array, sizes: Array) -> Array:
    """Return the standard error of ``mean`` over the last axis; s / sqrt(n) if each unit is one item."""
    units = sums.shape[-1]
    residuals = sums - mean(sums, sizes)[..., None] * sizes
    return np.asarray(np.sqrt(units / (units - 1) * np.square(residuals).sum(-1)) / sizes.sum(-1))


def scipy_intervals(sums: Array, sizes: Array, resamples: int, rng: np.random.Generator) -> tuple[Interval, Interval]:
    """Return the percentile and BCa intervals from the same resamples; that of equal values is the value itself."""
    data, center = (sums, sizes), float(mean(sums, sizes))
    plain = stats.bootstrap(data, mean, paired=True, n_resamples=resamples, method="percentile", rng=rng)
    with np.errstate(invalid="ignore"), warnings.catch_warnings(action="ignore", category=stats.DegenerateDataWarning):
        bca = stats.bootstrap(data, mean, paired=True, n_resamples=0, bootstrap_result=plain, method="BCa")
    low, high = np.nan_to_num(bca.confidence_interval, nan=center, posinf=np.inf, neginf=-np.inf)
    return tuple(plain.confidence_interval), (low, high)


def bootstrap_t(sums: Array, sizes: Array, resamples: int, rng: np.random.Generator) -> Interval:
    """Return the interval from the quantiles of t* = (mean* - mean) / se*.

    A resample with se* = 0 has an infinite t* with the sign of mean* - mean, or 0 if that is 0, too. An end whose
    quantile is infinite is therefore unbounded, and the interval of equal values is the value itself.
    """
    center, error = mean(sums, sizes), standard_error(sums, sizes)
    drawn = rng.integers(len(sums), size=(resamples, len(sums)))
    resampled = sums[drawn], sizes[drawn]
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (mean(*resampled) - center) / standard_error(*resampled)
    t = np.sort(np.where(np.isnan(t), 0.0, t))
    rank = int(TAIL * (resamples + 1))  # order statistics, because infinite values cannot be interpolated
    return float(center - t[-rank] * error), float(center - t[rank - 1] * error)


def intervals(scores: Scores, resamples: int, rng: np.random.Generator) -> dict[str, Interval]:
    base, edited, groups = scores
    units = np.arange(len(base)) if groups is None else groups
    sums, sizes = (np.bincount(units, each).astype(np.float64) for each in (edited - base, np.ones_like(base)))
    ours = paired_difference(base, edited, groups=groups, resamples=resamples, seed=int(rng.integers(2**32)))
    percentile, bca = scipy_intervals(sums, sizes, resamples, rng)
    studentised = bootstrap_t(sums, sizes, resamples, rng)
    return {"expanded": (ours.low, ours.high), "percentile": percentile, "BCa": bca, "bootstrap-t": studentised}


def measure(draw: Draw, truth: float, sets: int, resamples: int, seed: int) -> dict[str, float]:
    """Return the coverage of each interval, and the share of unbounded bootstrap-t intervals."""
    streams = [np.random.default_rng([seed, number]) for number in range(sets)]
    made = [intervals(draw(rng), resamples, rng) for rng in streams]
    ends = {method: np.array([each[method] for each in made]) for method in made[0]}
    covered = {m: (e[:, 0] <= truth + SLACK) & (e[:, 1] >= truth - SLACK) for m, e in ends.items()}
    unbounded = np.isinf(ends["bootstrap-t"]).any(axis=1)
    return {name: float(which.mean()) for name, which in {**covered, "unbounded t": unbounded}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=4000, help="simulated sets of each kind")
    parser.add_argument("--resamples", type=int, default=2000, help="bootstrap resamples of each set, at least 100")
    parser.add_argument("--seed", type=int, default=0, help="at least 0")
    parser.add_argument("--json", type=Path, help="file to write shares, settings and versions to")
    settings = vars(parser.parse_args())
    file, started = settings.pop("json"), time.perf_counter()
    kinds = track(KINDS.items(), "simulating", console=Console(stderr=True), transient=True)
    shares = {kind: measure(draw, truth, **settings) for kind, (draw, truth) in kinds}
    seconds = time.perf_counter() - started

    table = Table("data", *next(iter(shares.values())), title="Coverage of 95 % intervals")
    for kind, row in shares.items():
        table.add_row(kind, *(f"{share:.3f}" for share in row.values()))
    Console().print(table, f"standard error of a share p: sqrt(p (1 - p) / sets)\n{settings}, {seconds:.0f} s")
    if file:
        versions = {name: version(name) for name in ("numpy", "scipy", "sealign")}
        versions["python"] = platform.python_version()
        record = {"settings": settings, "versions": versions, "seconds": round(seconds, 1), "shares": shares}
        file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
