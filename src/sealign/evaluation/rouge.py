"""ROUGE of single answers without the resampling of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def without_resampling() -> Iterator[None]:
    """Return a single ROUGE score as its own interval inside a ``with`` block, instead of resampling it.

    ``truthfulqa_gen`` scores an answer against each of its references, and each time lets ``rouge-score`` draw 1000
    samples of that one number, all equal to it, which takes half a second per item. Intervals of several scores are
    resampled as usual.

    Example:
        >>> from rouge_score import rouge_scorer, scoring
        >>> aggregator = scoring.BootstrapAggregator()
        >>> aggregator.add_scores(rouge_scorer.RougeScorer(["rouge1"]).score("a cold sea", "a sea"))
        >>> with without_resampling():
        ...     round(float(aggregator.aggregate()["rouge1"].mid.fmeasure), 6)
        0.8
    """
    from rouge_score.scoring import BootstrapAggregator

    resample = BootstrapAggregator._bootstrap_resample

    def quick(aggregator: Any, matrix: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.repeat(matrix, 3, axis=0) if len(matrix) == 1 else resample(aggregator, matrix)
        return found

    BootstrapAggregator._bootstrap_resample = quick
    try:
        yield
    finally:
        BootstrapAggregator._bootstrap_resample = resample
