"""Finalists: candidates of the scan that are measured at about the strength that uses the damage budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sealign.evaluation.damage import Damage
from sealign.evaluation.scan import ScannedCandidate


@dataclass(frozen=True)
class Finalist:
    """A candidate that was measured on the development part at about the strength that uses the damage budget.

    Attributes:
        scanned: The candidate, with what the scan found.
        strength: Strength at which it was measured, somewhat below that for which the scan predicts the whole budget.
        neutral: Damage on neutral text at this strength.
        domain: Damage on own answers; None if all of them are empty.
        room: Factor by which the strength could grow until the budget is used; see ``DamageBudget``.
        gains: Gain of each development demonstration in the preference margin, in nats per token; or, if tasks were
            given, of each task in its first headline metric.
    """

    scanned: ScannedCandidate
    strength: float
    neutral: Damage
    domain: Damage | None
    room: float
    gains: Sequence[float]

    @property
    def gain(self) -> float:
        """Mean gain."""
        return float(np.mean(self.gains))

    @property
    def gain_at_budget(self) -> float:
        """Mean gain at the strength that uses the whole budget, since the gain grows with the strength.

        Minus infinity for a model that is broken.
        """
        return self.gain * self.room if 0 < self.room < math.inf else -math.inf

    @property
    def gain_error(self) -> float:
        """Standard error of the mean gain; NaN for a single gain."""
        return float(np.std(self.gains, ddof=1) / math.sqrt(len(self.gains))) if len(self.gains) > 1 else math.nan


def choose_finalists(scanned: Sequence[ScannedCandidate], count: int, budget: float) -> list[ScannedCandidate]:
    """Return the candidates with the largest predicted gain at a budget, at most two of one method and site.

    Args:
        scanned: The scan.
        count: Maximum number of finalists, all of which have a gain.
        budget: Damage in nats per token.
    """
    scanned = sorted(scanned, key=lambda each: each.gain_at(budget), reverse=True)
    taken: dict[tuple[str, str], int] = {}
    chosen: list[ScannedCandidate] = []
    for each in scanned:
        family = each.candidate.method, each.candidate.edit.site
        if each.efficiency > 0 and taken.get(family, 0) < 2 and len(chosen) < count:
            chosen.append(each)
            taken[family] = taken.get(family, 0) + 1
    return chosen
