"""The verdict on an edit: helps, no evidence, harms or broken, and at what damage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sealign.evaluation.statistics import Aim, Difference, holm

MAX_DAMAGE = 0.05
"""Default budget of the damage, in nats per token on neutral text."""

LEVEL = 0.05
"""Significance level: the probability of any false finding among the metrics of an edit."""


@dataclass(frozen=True)
class Effect:
    """The effect of an edit and of its controls on one metric.

    Attributes:
        name: Name of the metric.
        edited: Difference from the base model to the edited model.
        random: Difference from the base model to the mean of the random controls; None if there are none.
        over_random: Difference from that mean to the edited model; None if there are no random controls.
        reversed: Difference from the base model to the reversed edit; None if it was not evaluated.
        aim: Which values are good.
    """

    name: str
    edited: Difference
    random: Difference | None = None
    over_random: Difference | None = None
    reversed: Difference | None = None
    aim: Aim = "higher"

    @property
    def gain(self) -> float:
        """How much better the edited model is than the base model; negative if it is worse."""
        return self.edited.gain(self.aim)

    @property
    def beats_random(self) -> bool:
        """Whether the edit is better than random directions, by an interval that excludes 0."""
        beyond = self.over_random
        return beyond is not None and not beyond.low <= 0 <= beyond.high and beyond.gain(self.aim) > 0


@dataclass(frozen=True)
class Verdict:
    """The verdict on an edit.

    Attributes:
        word: ``helps``, ``no evidence``, ``harms`` or ``broken``, from the best to the worst.
        sentence: The word with its reasons.
    """

    word: Literal["helps", "no evidence", "harms", "broken"]
    sentence: str


def judge_effects(
    effects: Sequence[Effect], damage: float, *, max_damage: float = MAX_DAMAGE, broken: Sequence[str] = ()
) -> Verdict:
    """Return the verdict on an edit, given its effects on all metrics of a run.

    An edit is *broken* if a score or the damage is NaN or infinite. A metric has changed if its p-value is at most 0.05
    after Holm's correction over all effects. An edit *harms* if a metric got worse or the damage is over the budget.
    Otherwise it *helps* if a metric got better by more than in random directions, with an interval of that difference
    that excludes 0. In all other cases there is *no evidence*; a gain without a random control is no evidence.

    Args:
        effects: Effects on all metrics with finite scores.
        damage: Increase of the mean loss on neutral text, in nats per token.
        max_damage: Budget of the damage, in nats per token. Must be at least 0.
        broken: Descriptions of the scores that are not finite.

    Example:
        >>> from sealign.evaluation.statistics import paired_difference
        >>> same = paired_difference([0.0, 1.0, 1.0], [0.0, 1.0, 1.0])
        >>> judge_effects([Effect("acc", same)], 0.01).word
        'no evidence'
    """
    if not math.isfinite(damage):
        broken = [*broken, "the loss on neutral text"]
    if broken:
        return Verdict("broken", f"Broken: NaN or infinite numbers in {' and '.join(broken)}.")
    adjusted = holm([effect.edited.p_value for effect in effects])
    changed = [effect for effect, p in zip(effects, adjusted, strict=True) if p <= LEVEL]
    better = [effect for effect in changed if effect.gain > 0]
    worse = [effect for effect in changed if effect.gain < 0]
    cost = f"{damage:+.3f} nats per token on neutral text"
    if damage > max_damage:
        beside = f"; the gain on {_list(better)} does not count" if better else ""
        return Verdict("harms", f"Harms: it costs {cost}, over the budget of {max_damage:g}{beside}.")
    if worse:
        beside = f", though it improves {_list(better)}" if better else ""
        return Verdict("harms", f"Harms: it worsens {_list(worse)}{beside}, at {cost}.")
    real = [effect for effect in better if effect.beats_random]
    if real:
        sentence = f"Helps: it improves {_list(real)}, beyond random directions, at {cost}."
        turned = [e for e in real if e.reversed is not None and e.reversed.gain(e.aim) >= e.gain]
        if turned:
            names = " and ".join(effect.name for effect in turned)
            sentence += (
                f" The reversed edit does as well on {names}, so the contrast of the demonstrations is not what helps."
            )
        return Verdict("helps", sentence)
    if better and all(effect.over_random is None for effect in better):
        return Verdict(
            "no evidence", f"No evidence: {_list(better)} has no random control to compare with; it costs {cost}."
        )
    if better:
        return Verdict(
            "no evidence",
            f"No evidence: random directions do as well, within noise, on {_list(better)}; the edit costs {cost}.",
        )
    metrics = "metric" if len(effects) == 1 else f"{len(effects)} metrics"
    return Verdict(
        "no evidence",
        f"No evidence: no difference stands out from noise over the {metrics} measured; it costs {cost}.",
    )


def _list(effects: Sequence[Effect]) -> str:
    return " and ".join(
        f"{e.name} {e.edited.difference:+.3f} [{e.edited.low:+.3f}, {e.edited.high:+.3f}]" for e in effects
    )
