"""Preference: how much more probable a model finds positive completions than negative ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from sealign.demonstrations.demonstration import Demonstration
from sealign.evaluation.item_scores import ItemScores
from sealign.evaluation.scoring import score_continuations
from sealign.models.passages import completion_passages
from sealign.models.prompt_format import PromptFormat
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREFERENCE = "preference"
"""Name of the task in results."""

PREFERENCE_VERSION = "1"
"""Version of the task; it changes with the definition of a metric."""

LENGTH_SHARE, LENGTH_LEVEL = 0.6, 0.01

HEADLINES = ("preference_margin", "preference_accuracy")
"""Metrics that verdicts depend on."""


def preference_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    *,
    prompt_format: PromptFormat = PromptFormat(),
    track: Track = no_progress,
) -> dict[str, ItemScores]:
    """Return how a model prefers the positive completion of each demonstration, by metric.

    With l(c) = log p(c | prompt) and |c| the number of tokens of a completion,

    - ``preference_margin`` = l(positive) / |positive| - l(negative) / |negative|, in nats per token;
    - ``preference_accuracy`` = 1 if that margin is positive, 1/2 if it is zero, else 0;
    - ``preference_margin_total`` = l(positive) - l(negative), in nats.

    Prompts that several demonstrations share are run once where the model allows it.

    Args:
        model: The model, with the edits that are attached to it.
        tokenizer: Tokenizer of the model.
        demonstrations: Demonstrations that no edit was fitted on.
        prompt_format: How prompts are written.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.

    Raises:
        SettingError: A demonstration is longer than the model's context.
    """
    pairs = completion_passages(tokenizer, demonstrations, prompt_format=prompt_format)
    passages = [passage for pair in pairs for passage in pair]
    scores = score_continuations(
        model,
        tokenizer,
        [passage.ids[: passage.start] for passage in passages],
        [passage.ids[passage.start :] for passage in passages],
        track=track,
    )
    return preference_metrics(scores.log_probabilities, scores.tokens)


def preference_metrics(log_probabilities: npt.ArrayLike, tokens: npt.ArrayLike) -> dict[str, ItemScores]:
    """Return the metrics of ``preference_scores`` from the scores of all completions.

    Args:
        log_probabilities: l(positive) and l(negative) of each demonstration in turn, (2 n,).
        tokens: Numbers of tokens of the same completions, (2 n,).

    Example:
        >>> preference_metrics([-2.0, -6.0], [2, 3])["preference_margin"].value
        1.0
    """
    logs, lengths = (np.asarray(column, dtype=np.float64) for column in (log_probabilities, tokens))
    total, mean = (column[0::2] - column[1::2] for column in (logs, logs / lengths))
    items, correct = np.arange(len(total)), np.where(mean == 0, 0.5, mean > 0)
    return {
        "preference_margin": ItemScores(items, mean),
        "preference_accuracy": ItemScores(items, np.where(np.isnan(mean), np.nan, correct)),
        "preference_margin_total": ItemScores(items, total),
    }


def length_note(tokenizer: Any, demonstrations: Sequence[Demonstration]) -> str | None:
    """Return a warning if the lengths of the two completions alone predict which one is positive, else None.

    It is given if one side has fewer tokens in more than 60 % of the pairs of unequal lengths, and more often than
    chance would have it (two-sided binomial test at the level 0.01): an edit towards short or long texts would then
    have a gain, too.

    Args:
        tokenizer: Tokenizer of the model.
        demonstrations: Demonstrations that are scored.
    """
    lengths = [
        [len(tokenizer.encode(text, add_special_tokens=False)) for text in (item.positive, item.negative)]
        for item in demonstrations
    ]
    shorter = sum(positive < negative for positive, negative in lengths)
    longer = sum(positive > negative for positive, negative in lengths)
    unequal = shorter + longer
    if not unequal or stats.binomtest(shorter, unequal).pvalue > LENGTH_LEVEL:
        return None
    share, word = max((shorter / unequal, "shorter"), (longer / unequal, "longer"))
    if share <= LENGTH_SHARE:
        return None
    return (
        f"the positive completion is {word} in {share:.0%} of the pairs of unequal lengths, so a preference for {word} "
        "completions alone would be counted as a gain; balance the lengths if length is not the behaviour"
    )
