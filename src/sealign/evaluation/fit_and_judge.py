"""An edit fitted on a part of some demonstrations, and judged on the others, with its controls."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sealign.demonstrations.bundled import neutral_texts
from sealign.demonstrations.demonstration import Demonstration
from sealign.demonstrations.splits import Holdout, split_demonstrations
from sealign.edits.attach import apply_edit
from sealign.edits.edit import Edit
from sealign.evaluation.damage import Damage
from sealign.evaluation.evaluation_config import CONTROL_SEEDS
from sealign.evaluation.preference import HEADLINES, preference_scores
from sealign.evaluation.statistics import paired_difference
from sealign.evaluation.strength_choice import ANSWERED_PROMPTS, PART, DamageTexts, choose_strength
from sealign.evaluation.verdict import Effect, Verdict, judge_effects
from sealign.fitting.edit_config import EditConfig
from sealign.methods.registry import fit_edit
from sealign.models.shared_layers import share_layers
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELD_OUT = 0.3
"""Fraction of the prompts that an edit is judged on."""


@dataclass(frozen=True)
class JudgedFit:
    """An edit, and what it does on demonstrations that it was not fitted on.

    Attributes:
        edit: The edit, at the strength that was chosen.
        held_out: Number of demonstrations that were scored.
        effects: Effects on the preference margin and accuracy; the random control is the mean of several.
        damage: Mapping from arm (``edited``, ``random directions``, ``reversed``) to damage on neutral text that the
            choice of the strength did not use.
        domain_damage: The same on the base model's own answers to the held-out prompts.
        verdict: The verdict on the edit.
    """

    edit: Edit
    held_out: int
    effects: list[Effect]
    damage: dict[str, Damage]
    domain_damage: dict[str, Damage]
    verdict: Verdict


def fit_and_judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    *,
    config: EditConfig,
    strength: float | None = None,
    seed: int = 0,
    quick: bool = False,
    track: Track = no_progress,
) -> JudgedFit:
    """Fit an edit on seven tenths of the prompts, choose its strength, and measure it on the others.

    Prompts are split by topic where the demonstrations have topics.

    Args:
        model: The base model.
        tokenizer: Tokenizer of the model.
        demonstrations: Demonstrations of several prompts.
        config: Configuration of a method that edits activations.
        strength: Strength to use; None chooses the largest one within the damage budget.
        seed: Seed of the split, the random controls and the intervals.
        quick: Whether to measure damage on a third of the texts, which makes its intervals wider.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.

    Raises:
        DemonstrationError: There are too few prompts to split, or demonstrations to fit on.
        SettingError: The strength is out of range, or a setting does not fit the model.
    """
    holdout = Holdout(HELD_OUT, seed)
    fitted, held_out = split_demonstrations(demonstrations, holdout=holdout.fraction, seed=seed)
    edit = fit_edit(model, tokenizer, demonstrations, config=config, holdout=holdout, track=track)
    assert isinstance(edit, Edit)
    form, texts = config.prompt_format, neutral_texts()
    if strength is None:
        prompted = fitted[:ANSWERED_PROMPTS:PART] if quick else fitted
        chosen_on = DamageTexts.of(model, tokenizer, prompted, texts=texts[::2], prompt_format=form, track=track)
        chosen_on = _shortened(chosen_on) if quick else chosen_on
        strength = choose_strength(model, tokenizer, edit, chosen_on, limit=config.max_strength, track=track).strength
    edit = edit.with_strength(strength)
    controls = [edit.randomized(seed + offset) for offset in CONTROL_SEEDS]
    arms = [None, edit, *controls, edit.reversed()]
    scored = track(arms, "Scoring held-out demonstrations", len(arms))
    with share_layers(model, [edit.modules]):
        scores = [_scores(model, tokenizer, arm, held_out, config) for arm in scored]
    effects = [_effect(name, [arm[name] for arm in scores], seed) for name in HEADLINES]
    prompted = held_out[:ANSWERED_PROMPTS:PART] if quick else held_out
    measured_on = DamageTexts.of(model, tokenizer, prompted, texts=texts[1::2], prompt_format=form, track=track)
    measured_on = _shortened(measured_on) if quick else measured_on
    measured = measured_on.measure(model, tokenizer, [edit, controls[0], edit.reversed()], track=track)
    names = ("edited", "random directions", "reversed")
    damage = {name: neutral for name, (neutral, _) in zip(names, measured, strict=True)}
    domain = {name: own for name, (_, own) in zip(names, measured, strict=True) if own is not None}
    return JudgedFit(
        edit, len(held_out), effects, damage, domain, judge_effects(effects, damage["edited"].loss_increase)
    )


def _shortened(texts: DamageTexts) -> DamageTexts:
    """Return one in ``PART`` of the neutral passages, and all answers."""
    return DamageTexts(texts.neutral[::PART], texts.answers)


def _scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edit: Edit | None,
    held_out: Sequence[Demonstration],
    config: EditConfig,
) -> dict[str, NDArray[np.float64]]:
    """Return the headline metrics of the preference for each held-out demonstration."""
    with nullcontext() if edit is None else apply_edit(model, edit):
        found = preference_scores(model, tokenizer, held_out, prompt_format=config.prompt_format)
    return {name: found[name].numerators for name in HEADLINES}


def _effect(name: str, arms: list[NDArray[np.float64]], seed: int) -> Effect:
    """Return the effect on one metric, given its values for base, edit, random controls and reversed edit."""
    base, edited, *controls, turned = arms
    random = np.mean(controls, axis=0)
    return Effect(
        name,
        edited=paired_difference(base, edited, seed=seed),
        random=paired_difference(base, random, seed=seed),
        over_random=paired_difference(random, edited, seed=seed),
        reversed=paired_difference(base, turned, seed=seed),
    )
