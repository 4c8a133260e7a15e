from __future__ import annotations

import numpy as np
import pytest
from rouge_score import rouge_scorer, scoring

from sealign.evaluation.rouge import without_resampling

ANSWERS = [
    ("The sea is salty.", "The sea is full of salt."),
    ("No.", "No, it is not."),
    ("Bees make honey", "Cows give milk"),
    ("a b c d e f g", "a c e g i"),
]


def _aggregate(pairs: list[tuple[str, str]]) -> dict[str, scoring.AggregateScore]:
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeLsum"])
    aggregator = scoring.BootstrapAggregator()
    for target, answer in pairs:
        aggregator.add_scores(scorer.score(target, answer))
    return aggregator.aggregate()


@pytest.mark.parametrize("pair", ANSWERS)
def test_a_single_score_equals_its_resampling(pair: tuple[str, str]) -> None:
    expected = _aggregate([pair])
    with without_resampling():
        assert _aggregate([pair]) == expected


def test_one_score_is_not_resampled_and_several_are(monkeypatch: pytest.MonkeyPatch) -> None:
    np.random.seed(0)
    expected = _aggregate(ANSWERS)
    with without_resampling():
        np.random.seed(0)
        assert _aggregate(ANSWERS) == expected
        monkeypatch.setattr(np.random, "choice", None)
        _aggregate(ANSWERS[:1])
        with pytest.raises(TypeError):
            _aggregate(ANSWERS)


def test_the_library_is_restored() -> None:
    before = scoring.BootstrapAggregator._bootstrap_resample
    with pytest.raises(ZeroDivisionError), without_resampling():
        assert scoring.BootstrapAggregator._bootstrap_resample is not before
        raise ZeroDivisionError
    assert scoring.BootstrapAggregator._bootstrap_resample is before
