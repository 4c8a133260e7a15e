"""What can be said of an edit in words: helps, no evidence, or harms, and at what damage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sealign.evaluation.statistics import Aim, Difference, holm

MAX_DAMAGE = 0.05
"""Rise of the mean loss on neutral text that a useful edit may cause by default, in nats a token."""

LEVEL = 0.05
"""Chance of any false finding among the metrics of an edit."""


@dataclass(frozen=True)
class Effect:
    """One metric under an edit and under its control.

    Attributes:
        name: of the metric.
        edited: from the base model to the edited one.
        random: from the base model to the mean of its edits in random directions; None where none was run.
        over_random: from that mean to the edited model; None likewise.
        reversed: from the base model to the edit with its roles swapped; None where it was not run.
        aim: which way is good.
    """

    name: str
    edited: Difference
    random: Difference | None = None
    over_random: Difference | None = None
    reversed: Difference | None = None
    aim: Aim = "higher"

    @property
    def gain(self) -> float:
        """How far the edited model is on the good side of the base model."""
        return self.edited.gain(self.aim)

    @property
    def beats_random(self) -> bool:
        """Whether the edit is on the good side of random directions by an interval without zero."""
        beyond = self.over_random
        return beyond is not None and not beyond.low <= 0 <= beyond.high and beyond.gain(self.aim) > 0


@dataclass(frozen=True)
class Verdict:
    """What can be said of an edit.

    Attributes:
        word: ``helps``, ``no evidence`` or ``harms``.
        sentence: the word with its reasons.
    """

    word: Literal["helps", "no evidence", "harms"]
    sentence: str


def judge_effects(effects: Sequence[Effect], damage: float, *, max_damage: float = MAX_DAMAGE) -> Verdict:
    """Return what can be said of an edit, given its effects on all metrics of a run.

    A metric changed if its p-value is at most 0.05 after Holm's correction over all effects. An edit *harms* if a
    metric got worse or the damage is over the budget; it *helps* if, otherwise, a metric got better by more than under
    random directions of the same ranks, the interval of that difference excluding zero; else there is *no
    evidence*. A gain without a random control is no evidence.

    Args:
        effects: one a metric, at least 1.
        damage: rise of the mean loss on neutral text, in nats a token.
        max_damage: its budget, at least 0.

    Example:
        >>> from sealign.evaluation.statistics import paired_difference
        >>> same = paired_difference([0.0, 1.0, 1.0], [0.0, 1.0, 1.0])
        >>> judge_effects([Effect("acc", same)], 0.01).word
        'no evidence'
    """
    adjusted = holm([effect.edited.p_value for effect in effects])
    changed = [effect for effect, p in zip(effects, adjusted, strict=True) if p <= LEVEL]
    better = [effect for effect in changed if effect.gain > 0]
    worse = [effect for effect in changed if effect.gain < 0]
    cost = f"{damage:+.3f} nats a token on neutral text"
    if damage > max_damage:
        beside = f"; {_list(better)} does not count beside it" if better else ""
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
            sentence += f" Reversed, it does as well on {names}: the contrast it was fitted on is not what helps."
        return Verdict("helps", sentence)
    if better and all(effect.over_random is None for effect in better):
        return Verdict(
            "no evidence", f"No evidence: {_list(better)} has no random control to be compared with; it costs {cost}."
        )
    if better:
        return Verdict(
            "no evidence",
            f"No evidence: random directions do as well, within noise, on {_list(better)}; it costs {cost}.",
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
