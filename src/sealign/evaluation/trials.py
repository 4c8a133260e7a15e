"""The settings that tuning tried, with what they gained and cost."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sealign.methods.sea_config import FitConfig

if TYPE_CHECKING:
    import optuna

SEARCHED = ("site", "layers", "explained_variance", "centered", "feature_map", "normalization", "combine")
"""Settings of the fit that a trial draws."""


@dataclass(frozen=True)
class TrialRecord:
    """One setting that was tried.

    Attributes:
        number: of the trial.
        state: ``complete``, ``pruned`` (given up on a part of the items) or ``failed``.
        gain: of the development score, over the items it was scored on; None if none.
        damage: rise of the loss on the development half of the neutral text; None if it was not measured.
        damage_bound: upper end of its one-sided 95 % interval over texts.
        strength: that was found for its share of the budget.
        settings: of the fit.
    """

    number: int
    state: str
    gain: float | None
    damage: float | None
    damage_bound: float | None
    strength: float | None
    settings: dict[str, Any]

    @property
    def point(self) -> tuple[float, float] | None:
        """Damage and gain; None where one was not measured."""
        return None if self.damage is None or self.gain is None else (self.damage, self.gain)


def read_trial(trial: optuna.trial.FrozenTrial) -> TrialRecord:
    """Return the record of a trial of the study."""
    known = trial.user_attrs
    states = {"COMPLETE": "complete", "PRUNED": "pruned"}
    return TrialRecord(
        trial.number,
        states.get(trial.state.name, "failed"),
        known.get("gain"),
        known.get("damage"),
        known.get("damage_bound"),
        known.get("strength"),
        known.get("settings", {}),
    )


def best_trial(trials: Sequence[TrialRecord], max_damage: float) -> TrialRecord | None:
    """Return the complete trial of highest gain with its bound on the damage in the budget; None where none gained."""
    able = [
        (trial.gain, trial)
        for trial in trials
        if trial.state == "complete" and trial.gain is not None and trial.damage_bound is not None
        if trial.gain > 0 and trial.damage_bound <= max_damage
    ]
    return max(able, key=lambda pair: pair[0])[1] if able else None


def trial_config(base: FitConfig, trial: TrialRecord) -> FitConfig:
    """Return the settings of a trial at full strength, read back from the study."""
    read = {name: trial.settings[name] for name in SEARCHED}
    given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in read.items()}
    return dataclasses.replace(base, strength=1.0, **given)


def trials_csv(trials: Sequence[TrialRecord]) -> str:
    """Return all trials as CSV."""
    buffer = io.StringIO()
    names = ["number", "state", "gain", "damage", "damage_bound", "strength", *SEARCHED]
    writer = csv.DictWriter(buffer, names, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for trial in trials:
        writer.writerow({**trial.settings, **dataclasses.asdict(trial)})
    return buffer.getvalue()
