"""The trials of a tuning study: their settings, gain and damage."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sealign.evaluation.tuning_config import TunedConfig

if TYPE_CHECKING:
    import optuna

SEARCHED = ("site", "layers", "explained_variance", "centered", "feature_map", "normalization", "combine")
"""Settings that a trial draws, if the method has them."""


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """The result of one trial.

    Attributes:
        number: Number of the trial, from 0.
        state: ``complete``, ``pruned`` (stopped after a part of the items) or ``failed``.
        gain: Improvement of the development score, over the items that were scored; None if there are none.
        damage: Increase of the loss on the development half of the neutral text, in nats per token; None if it was not
            measured.
        damage_bound: Upper end of the one-sided 95 % interval of the damage over texts.
        strength: Strength chosen for the fraction of the budget that the trial drew.
        settings: Settings of the fit.
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
        """Damage and gain; None if one of them was not measured."""
        return None if self.damage is None or self.gain is None else (self.damage, self.gain)


def read_trial(trial: optuna.trial.FrozenTrial) -> TrialRecord:
    """Return the record of a trial of a study."""
    known = trial.user_attrs
    states = {"COMPLETE": "complete", "PRUNED": "pruned"}
    return TrialRecord(
        number=trial.number,
        state=states.get(trial.state.name, "failed"),
        gain=known.get("gain"),
        damage=known.get("damage"),
        damage_bound=known.get("damage_bound"),
        strength=known.get("strength"),
        settings=known.get("settings", {}),
    )


def best_trial(trials: Sequence[TrialRecord], max_damage: float) -> TrialRecord | None:
    """Return the complete trial with the highest gain whose damage bound is within the budget.

    Args:
        trials: Trials of a study.
        max_damage: Budget, in nats per token.

    Returns:
        None if no such trial has a gain above 0.
    """
    able = [
        (trial.gain, trial)
        for trial in trials
        if trial.state == "complete" and trial.gain is not None and trial.damage_bound is not None
        if trial.gain > 0 and trial.damage_bound <= max_damage
    ]
    return max(able, key=lambda pair: pair[0])[1] if able else None


def trial_config(base: TunedConfig, trial: TrialRecord) -> TunedConfig:
    """Return the configuration of a trial at strength 1, from its record.

    Args:
        base: Configuration with the settings that were not searched.
        trial: Record of the trial.
    """
    drawn = {name: trial.settings[name] for name in SEARCHED if name in trial.settings}
    return base.replace(**({"rank": None} if "explained_variance" in drawn else {}), strength=1.0, **drawn)


def trials_csv(trials: Sequence[TrialRecord]) -> str:
    """Return all trials as CSV with a header."""
    buffer = io.StringIO()
    names = ["number", "state", "gain", "damage", "damage_bound", "strength", *SEARCHED]
    writer = csv.DictWriter(buffer, names, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for trial in trials:
        writer.writerow({**trial.settings, **dataclasses.asdict(trial)})
    return buffer.getvalue()
