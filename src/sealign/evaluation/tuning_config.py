"""Settings of tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sealign.errors import SettingError
from sealign.evaluation.evaluate_edits import EvaluationConfig
from sealign.evaluation.verdict import MAX_DAMAGE
from sealign.methods.sea_config import FitConfig


@dataclass(frozen=True)
class TuneConfig:
    """What is searched, and for how long.

    Attributes:
        tasks: whose scores are to rise; the mean of the first headline metric of each. At least 1.
        data_dir: a folder with the tasks' data in the Hub's schemas; the Hub if None.
        limit: use the first so many items of each task; all if None.
        max_damage: budget of the loss on neutral text, in nats a token, above 0.
        trials: settings tried, at most, over all sessions of the study; at least 1.
        minutes: of search in this session, at most; no bound if None.
        deployable: keep to edits that weights carry exactly.
        development_share: of the items of each task, in (0, 1); the rest tests the winner.
        seed: of the split and the search, at least 0.
        fit: settings of the fit that are not searched.

    Raises:
        SettingError: a value is out of range.
    """

    tasks: Sequence[str]
    data_dir: Path | None = None
    limit: int | None = None
    max_damage: float = MAX_DAMAGE
    trials: int = 60
    minutes: float | None = None
    deployable: bool = False
    development_share: float = 0.5
    seed: int = 0
    fit: FitConfig = FitConfig()

    def __post_init__(self) -> None:
        if not self.max_damage > 0:
            raise SettingError(f"max_damage is {self.max_damage}, but it must be above 0; try 0.05")
        if not 0 < self.development_share < 1:
            raise SettingError(f"development_share is {self.development_share}, but it must be in (0, 1); try 0.5")
        if self.trials < 1:
            raise SettingError(f"trials is {self.trials}, but it must be at least 1")
        EvaluationConfig(self.tasks, self.data_dir, self.limit)
