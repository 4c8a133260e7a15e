"""The demo: an edit for each of several behaviours, measured on demonstrations of other topics, with its controls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sealign.demonstrations.prompts import load_prompts
from sealign.demonstrations.sources import load_demonstrations
from sealign.evaluation.answers import Answers, compare_answers
from sealign.evaluation.fit_and_judge import JudgedFit, fit_and_judge
from sealign.fitting.edit_config import EditConfig
from sealign.methods.difference_operator import DifferenceOperatorConfig
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEMO_BEHAVIOURS = ("positivity", "truthfulness")
"""Bundled behaviours of the demo: one that a reader sees in the answers, and one that the scores show."""

DEMO_CONFIG = DifferenceOperatorConfig()

ANSWERED = 4
"""Number of prompts that are answered for each behaviour."""

QUICK_PAIRS = 3
"""The short version takes every third demonstration, so that all topics remain."""

QUICK_ANSWERED = 1
"""Number of prompts that the short version answers."""


@dataclass(frozen=True)
class BehaviourResult(JudgedFit):
    """What the demo finds for one behaviour: see ``JudgedFit`` for what else it holds.

    Attributes:
        behaviour: Name of the bundled behaviour.
        answers: Answers to prompts of further topics, with and without the edit.
        quick: Whether this is the short version.
    """

    behaviour: str
    answers: list[Answers]
    quick: bool = False


def run_demo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    behaviour: str,
    *,
    config: EditConfig = DEMO_CONFIG,
    strength: float | None = None,
    seed: int = 0,
    quick: bool = False,
    track: Track = no_progress,
) -> BehaviourResult:
    """Fit an edit for a bundled behaviour, choose its strength, and measure it on demonstrations of other topics.

    Args:
        model: The base model.
        tokenizer: Tokenizer of the model.
        behaviour: Name of a bundled behaviour.
        config: Configuration of a method that edits activations.
        strength: Strength to use; None chooses the largest one within the damage budget.
        seed: Seed of the split, the random controls and the intervals.
        quick: Whether to take every third demonstration and every third text for the damage, and to answer one prompt.
            The edit is chosen and judged in the same way, with wider intervals.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.
    """
    source = f"bundled:{behaviour}"
    demonstrations = load_demonstrations(source)
    fit = fit_and_judge(
        model,
        tokenizer,
        demonstrations[::QUICK_PAIRS] if quick else demonstrations,
        config=config,
        strength=strength,
        seed=seed,
        quick=quick,
        track=track,
    )
    prompts = [prompt.text for prompt in load_prompts(source)[: QUICK_ANSWERED if quick else ANSWERED]]
    answers = compare_answers(
        model, tokenizer, fit.edit, prompts, prompt_format=config.prompt_format, max_new_tokens=48
    )
    return BehaviourResult(**vars(fit), behaviour=behaviour, answers=answers, quick=quick)
