"""Choice of an edit's strength by the damage that it may do, on neutral text and on the model's own answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sealign.demonstrations.demonstration import Demonstration
from sealign.edits.edit import Edit
from sealign.edits.strength import MAX_STRENGTH
from sealign.errors import SettingError
from sealign.evaluation.damage import Damage, bundled_texts, check_passages, measure_passages
from sealign.evaluation.verdict import MAX_DAMAGE
from sealign.models.passages import Passage, answer_passages, text_passages
from sealign.models.prompt_format import PromptFormat
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PASSAGE_LENGTH = 48
"""Number of tokens at which neutral text is split, so that the interval of its damage rests on many passages."""

NEUTRAL_PASSAGES = 24
ANSWERED_PROMPTS = 20
STEPS = 8
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
        passages = text_passages(tokenizer, bundled_texts() if texts is None else texts, length=PASSAGE_LENGTH)
        # Evenly from all texts; a rest of a few tokens would count as much as a whole passage in the interval.
        whole = [passage for passage in passages if len(passage.ids) >= PASSAGE_LENGTH // 2]
        check_passages(whole)
        step = max(1, len(whole) // NEUTRAL_PASSAGES)
        answers = answer_passages(
            model, tokenizer, demonstrations[:ANSWERED_PROMPTS], prompt_format=prompt_format, track=track
        )
        return cls(whole[::step][:NEUTRAL_PASSAGES], answers)

    @torch.no_grad()
    def measure(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        edits: Sequence[Edit],
        *,
        track: Track = no_progress,
    ) -> list[tuple[Damage, Damage | None]]:
        """Return the damage of each edit on neutral text and on own answers, None where all answers are empty.

        Args:
            model: The base model, without an edit.
            tokenizer: Tokenizer of the model.
            edits: Edits, each measured alone and at its own strength.
            track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.
        """
        neutral = measure_passages(model, tokenizer, edits, self.neutral, batch_size=BATCH, track=track)
        if len(self.answers) < 2:
            return [(damage, None) for damage in neutral]
        domain = measure_passages(model, tokenizer, edits, self.answers, batch_size=BATCH, track=track)
        return list(zip(neutral, domain, strict=True))


@dataclass(frozen=True)
class DamageBudget:
    """The KL divergence from the base model, in nats per token, that an edit may cause.

    Attributes:
        neutral: Budget on neutral text. Must be above 0.
        domain: Budget on own answers; that on neutral text if None. Must be above 0.

    Raises:
        SettingError: A budget is not above 0.

    Example:
        >>> DamageBudget(0.5).used(0.125, 0.25)
        0.5
    """

    neutral: float = MAX_DAMAGE
    domain: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("max_damage", self.neutral), ("max_domain_damage", self.domain)):
            if value is not None and not value > 0:
                raise SettingError(f"{name} is {value}, but it must be above 0")

    def used(self, neutral: float, domain: float | None) -> float:
        """Return the fraction of the budget that is used, on the text where it is larger; infinity if not finite.

        Args:
            neutral: Divergence on neutral text.
            domain: Divergence on own answers; None if there are none.
        """
        shares = [neutral / self.neutral]
        if domain is not None:
            shares.append(domain / (self.domain or self.neutral))
        return max(shares) if all(map(math.isfinite, shares)) else math.inf


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
    track: Track = no_progress,
) -> StrengthChoice:
    """Return the largest strength found for which the damage of an edit is within a budget.

    Damage is the mean KL(base || edited), in nats per token; the upper end of its one-sided 95 % interval must be
    within the budget on both kinds of text. It grows about as the square of the strength, so a few measurements are
    enough.

    Args:
        model: The base model, without an edit.
        tokenizer: Tokenizer of the model.
        edit: Edit; its own strength is not used.
        texts: Neutral text and own answers.
        budget: Damage that the edit may do.
        start: Strength to try first. Default: the one that changes activations by 3 %.
        limit: Largest strength to choose. Must be above 0.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.

    Raises:
        SettingError: The limit is not above 0.
    """
    if not limit > 0:
        raise SettingError(f"limit is {limit}, but it must be above 0")
    limit = min(limit, MAX_STRENGTH)
    strength = min(limit, _first_strength(edit) if start is None else start)
    best: StrengthChoice | None = None
    for _ in track(range(STEPS), "Choosing the strength", STEPS):
        ((neutral, domain),) = texts.measure(model, tokenizer, [edit.with_strength(strength)])
        found = StrengthChoice(strength, neutral, domain)
        used = budget.used(neutral.divergence_bound, None if domain is None else domain.divergence_bound)
        if used <= 1 and (best is None or strength > best.strength):
            best = found
        if (0.8 <= used <= 1) or (used <= 1 and strength >= limit):
            break
        # Aims at nine tenths of the budget; a step that grows too fast can leave the region where KL is quadratic.
        strength = min(limit, strength * min(4.0, max(0.05, math.sqrt(0.9 / max(used, 1e-9)))))
    if best is None:
        ((neutral, domain),) = texts.measure(model, tokenizer, [edit.with_strength(0.0)])
        best = StrengthChoice(0.0, neutral, domain)
    return best


def _first_strength(edit: Edit) -> float:
    """Return the strength that changes activations by ``FIRST_CHANGE``, from the changes that the fit recorded."""
    changes = [layer.relative_change for layer in edit.record.layers.values()]
    total = sum(changes) / abs(edit.strength) if edit.strength else 0.0
    return FIRST_CHANGE / total if total > 0 and math.isfinite(total) else 1.0
