"""Choice of an edit's strength by the damage that it may do, on neutral text and on the model's own answers."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sealign.demonstrations.bundled import neutral_texts
from sealign.demonstrations.demonstration import Demonstration
from sealign.edits.edit import Edit
from sealign.edits.strength import MAX_STRENGTH
from sealign.errors import ModelError, SettingError
from sealign.evaluation.damage import Damage, check_passages, measure_passages
from sealign.evaluation.journal import Journal
from sealign.evaluation.verdict import MAX_DAMAGE
from sealign.models.passages import Passage, answer_passages, text_passages
from sealign.models.prompt_format import PromptFormat
from sealign.models.shared_layers import share_layers
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

PASSAGE_LENGTH = 48
"""Number of tokens at which neutral text is split, so that the interval of its damage rests on many passages."""

NEUTRAL_PASSAGES = 24
ANSWERED_PROMPTS = 16
ANSWER_TOKENS = 24
"""Largest number of tokens of an own answer."""

PART = 3
"""One in so many texts is used to find a first strength."""

STEPS = 8
AIM, ROUGH_AIM, ENOUGH = 0.95, 0.85, 1.2
"""Part of the room that a step of the choice takes, after a measurement on all texts or on a part of them, and room at
which it is content."""

BATCH = 8
FIRST_CHANGE = 0.03
"""Mean relative change of the activations at the first strength that is tried."""


@dataclass(frozen=True)
class DamageTexts:
    """What damage is measured on.

    Attributes:
        neutral: Passages of text that is unrelated to the edit.
        answers: The base model's own answers to prompts of the demonstrations; the domain of the edit.
    """

    neutral: Sequence[Passage]
    answers: Sequence[Passage]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        demonstrations: Sequence[Demonstration],
        *,
        texts: Sequence[str] | None = None,
        prompt_format: PromptFormat = PromptFormat(),
        track: Track = no_progress,
    ) -> DamageTexts:
        """Choose neutral passages, and let the base model answer prompts of demonstrations.

        Args:
            model: The base model, without an edit.
            tokenizer: Tokenizer of the model.
            demonstrations: Demonstrations whose prompts are answered; the first ``ANSWERED_PROMPTS`` are used.
            texts: Neutral texts; the bundled ones if None.
            prompt_format: How prompts are written.
            track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.

        Raises:
            SettingError: The texts give fewer than 2 passages.
        """
        passages = text_passages(tokenizer, neutral_texts() if texts is None else texts, length=PASSAGE_LENGTH)
        # Evenly from all texts; a rest of a few tokens would count as much as a whole passage in the interval.
        whole = [passage for passage in passages if len(passage.ids) >= PASSAGE_LENGTH // 2]
        check_passages(whole)
        step = max(1, len(whole) // NEUTRAL_PASSAGES)
        answers = answer_passages(
            model,
            tokenizer,
            demonstrations[:ANSWERED_PROMPTS],
            prompt_format=prompt_format,
            max_new_tokens=ANSWER_TOKENS,
            track=track,
        )
        return cls(whole[::step][:NEUTRAL_PASSAGES], answers)

    def part(self) -> DamageTexts:
        """Return one in ``PART`` texts of each kind, at least 2 where there are so many."""
        neutral, answers = (own[::PART] if len(own) > PART else own for own in (self.neutral, self.answers))
        return DamageTexts(neutral, answers)

    @torch.no_grad()
    def measure(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        edits: Sequence[Edit],
        *,
        journal: Journal | None = None,
        track: Track = no_progress,
    ) -> list[tuple[Damage, Damage | None]]:
        """Return the damage of each edit on neutral text and on own answers, None where all answers are empty.

        Args:
            model: The base model, without an edit.
            tokenizer: Tokenizer of the model.
            edits: Edits, each measured alone and at its own strength.
            journal: Journal of finished batches. Must not be shared between models.
            track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.

        Raises:
            ModelError: The base model gives numbers that are not finite.
        """
        neutral = measure_passages(
            model, tokenizer, edits, self.neutral, batch_size=BATCH, journal=journal, track=track
        )
        if not all(math.isfinite(damage.base_loss) for damage in neutral):
            raise ModelError(
                f"the loss of the base model on neutral text is {neutral[0].base_loss}, so no damage can be measured; "
                "check its weights, or load it with --dtype float32"
            )
        if len(self.answers) < 2:
            return [(damage, None) for damage in neutral]
        domain = measure_passages(model, tokenizer, edits, self.answers, batch_size=BATCH, journal=journal, track=track)
        return list(zip(neutral, domain, strict=True))


@dataclass(frozen=True)
class DamageBudget:
    """The damage that an edit may do, in nats per token.

    On neutral text it is the increase of the loss and the KL divergence from the base model, each of which must be
    within the budget: the loss can rise in proportion to a small strength, where the divergence only grows with its
    square. On own answers it is the divergence alone, since an answer is the most probable one by choice, so that
    any change makes it less probable.

    Attributes:
        neutral: Budget on neutral text. Must be above 0.
        domain: Budget on own answers; that on neutral text if None. Must be above 0.

    Raises:
        SettingError: A budget is not above 0.
    """

    neutral: float = MAX_DAMAGE
    domain: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("max_damage", self.neutral), ("max_domain_damage", self.domain)):
            if value is not None and not value > 0:
                raise SettingError(f"{name} is {value}, but it must be above 0")

    def room(self, neutral: Damage, domain: Damage | None, *, bounds: bool = False) -> float:
        """Return the factor by which a strength can grow until an edit uses the budget; below 1 if it is over it.

        It is 0 for a model that is broken.

        Args:
            neutral: Damage on neutral text.
            domain: Damage on own answers; None if there are none.
            bounds: Whether the upper ends of the one-sided 95 % intervals must be within the budget, and not the means.
        """
        if bounds:
            loss, divergence = neutral.loss_bound, neutral.divergence_bound
            own = None if domain is None else domain.divergence_bound
        else:
            loss, divergence = neutral.loss_increase, neutral.mean_divergence
            own = None if domain is None else domain.mean_divergence
        factors = [growth(self.neutral, 0.0, divergence), growth(self.neutral, loss - divergence, divergence)]
        if own is not None:
            factors.append(growth(self.domain or self.neutral, 0.0, own))
        return min(factors)


def growth(budget: float, slope: float, curvature: float) -> float:
    """Return the largest factor f with slope f + curvature f^2 = budget; 0 if one of them is not finite.

    The increase of the loss has this form: to first order the edit makes text more or less probable, and to second
    order it adds the divergence.

    Args:
        budget: Budget, above 0.
        slope: Part of the damage that grows with the strength.
        curvature: Part that grows with its square, at least 0.

    Example:
        >>> growth(0.5, 0.0, 0.125), growth(0.5, 0.75, 0.25)
        (2.0, 0.5615528128088303)
    """
    if not (math.isfinite(slope) and math.isfinite(curvature)):
        return 0.0
    if curvature <= 0:
        return budget / slope if slope > 0 else math.inf
    return (math.sqrt(slope**2 + 4 * curvature * budget) - slope) / (2 * curvature)


@dataclass(frozen=True)
class StrengthChoice:
    """A strength, and the damage that the edit does at it.

    Attributes:
        strength: The chosen strength; 0 if no strength is within the budget.
        neutral: Damage on neutral text.
        domain: Damage on the base model's own answers; None if all of them are empty.
    """

    strength: float
    neutral: Damage
    domain: Damage | None


def choose_strength(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edit: Edit,
    texts: DamageTexts,
    *,
    budget: DamageBudget = DamageBudget(),
    start: float | None = None,
    limit: float = math.inf,
    journal: Journal | None = None,
    track: Track = no_progress,
) -> StrengthChoice:
    """Return the largest strength found for which the damage of an edit is within a budget.

    The upper ends of the one-sided 95 % intervals must be within it; see ``DamageBudget``. How damage grows with the
    strength is known, so that a few measurements are enough; the first ones are made on a part of the texts.

    Args:
        model: The base model, without an edit.
        tokenizer: Tokenizer of the model.
        edit: Edit; its own strength is not used.
        texts: Neutral text and own answers.
        budget: Damage that the edit may do.
        start: Strength to try first, on all texts. Default: found on a part of the texts, from the strength that
            changes activations by 3 %.
        limit: Largest strength to choose. Must be above 0.
        journal: Journal of finished measurements. Must not be shared between models.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.

    Raises:
        SettingError: The limit is not above 0.
    """
    if not limit > 0:
        raise SettingError(f"limit is {limit}, but it must be above 0")
    limit = min(limit, MAX_STRENGTH)
    strength = min(limit, _first_strength(edit) if start is None else start)
    rough = start is None
    best: StrengthChoice | None = None
    with share_layers(model, [edit.modules]):
        for _ in track(range(STEPS), "Choosing the strength", STEPS):
            measured_on = texts.part() if rough else texts
            ((neutral, domain),) = measured_on.measure(
                model, tokenizer, [edit.with_strength(strength)], journal=journal
            )
            room = budget.room(neutral, domain, bounds=not rough)
            where = "a part of the texts" if rough else "all texts"
            _log.debug("strength %.4g could be %.3g times as large within the budget, on %s", strength, room, where)
            aim = AIM
            if rough:
                aim = ROUGH_AIM
                rough = not (0.5 <= room <= 2 or (room > 1 and strength >= limit))
            else:
                if room >= 1 and (best is None or strength > best.strength):
                    best = StrengthChoice(strength, neutral, domain)
                if 1 <= room <= ENOUGH or (room >= 1 and strength >= limit):
                    break
            # A step that grows too fast can leave the region where damage grows as it does for small strengths.
            strength = min(limit, strength * min(4.0, max(0.05, aim * room)))
        if best is None:
            ((neutral, domain),) = texts.measure(model, tokenizer, [edit.with_strength(0.0)], journal=journal)
            best = StrengthChoice(0.0, neutral, domain)
    _log.info("chose strength %.4g by the damage budget", best.strength)
    return best


def _first_strength(edit: Edit) -> float:
    """Return the strength that changes activations by ``FIRST_CHANGE``, from the changes that the fit recorded."""
    changes = [layer.relative_change for layer in edit.record.layers.values()]
    total = sum(changes) / abs(edit.strength) if edit.strength else 0.0
    return FIRST_CHANGE / total if total > 0 and math.isfinite(total) else 1.0
