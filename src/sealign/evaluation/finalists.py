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
        strength: Strength at which it was measured: that for which the scan predicts 80 % of the budget.
        neutral: Damage on neutral text at this strength.
        domain: Damage on own answers; None if all of them are empty.
        used: Fraction of the budget that was used, on the text where it is larger.
        gains: Gain of each development demonstration in the preference margin, in nats per token; or, if tasks were
            given, of each task in its first headline metric.
    """

    scanned: ScannedCandidate
    strength: float
    neutral: Damage
    domain: Damage | None
    used: float
    gains: Sequence[float]

    @property
    def gain(self) -> float:
        """Mean gain."""
        return float(np.mean(self.gains))

    @property
    def gain_at_budget(self) -> float:
        """Mean gain at the strength that uses the whole budget: the gain grows with the strength, damage as its square.

        Minus infinity for a model that is broken.
        """
        return self.gain / math.sqrt(self.used) if math.isfinite(self.used) and self.used > 0 else -math.inf

    @property
    def gain_error(self) -> float:
        """Standard error of the mean gain; NaN for a single gain."""
        return float(np.std(self.gains, ddof=1) / math.sqrt(len(self.gains))) if len(self.gains) > 1 else math.nan


def choose_finalists(scanned: Sequence[ScannedCandidate], count: int) -> list[ScannedCandidate]:
    """Return the most efficient candidates, at most two of one method and site, and only those with a gain.

    Args:
        scanned: The scan, the most efficient candidates first.
        count: Maximum number of finalists.
    """
    taken: dict[tuple[str, str], int] = {}
    chosen: list[ScannedCandidate] = []
    for each in scanned:
        family = each.candidate.method, each.candidate.edit.site
        if each.efficiency > 0 and taken.get(family, 0) < 2 and len(chosen) < count:
            chosen.append(each)
            taken[family] = taken.get(family, 0) + 1
    return chosen
