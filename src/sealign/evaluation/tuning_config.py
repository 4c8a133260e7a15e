"""Settings of tuning."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sealign.evaluation.evaluation_config import TaskConfig
from sealign.evaluation.verdict import MAX_DAMAGE
from sealign.methods.mean_difference import MeanDifferenceConfig
from sealign.methods.sea import SEAConfig

TunedConfig = SEAConfig | MeanDifferenceConfig
"""Configurations of the methods that can be tuned: those that fit each layer by itself, from one collection."""


class TuneConfig(TaskConfig):
    """Settings of tuning; see ``TaskConfig`` for the tasks.

    The first headline metric of each task is tuned, averaged over tasks.

    Attributes:
        max_damage: Maximum accepted increase of the loss on neutral text, in nats per token. Must be above 0.
        trials: Maximum number of trials, over all runs of the study. Must be at least 1.
        minutes: Maximum duration of the search in this run, in minutes; None sets no limit.
        deployable: Whether to search only edits that can be merged exactly into the weights (affine, not rescaled).
        development_fraction: Fraction of the items of each task that the search uses, in (0, 1). The best edit is
            tested on the other items.
        seed: Seed of the split and of the search. Must be at least 0.
        fit: Configuration of the method, with the settings that are not searched.

    Raises:
        SettingError: A value is unknown or out of range, or the method cannot be tuned.

    Example:
        >>> TuneConfig(tasks=["truthfulqa_mc2"], trials=20).fit.site
        'mlp'
    """

    max_damage: Annotated[float, Field(gt=0, examples=[MAX_DAMAGE])] = MAX_DAMAGE
    trials: Annotated[int, Field(ge=1)] = 60
    minutes: float | None = None
    deployable: bool = False
    development_fraction: Annotated[float, Field(gt=0, lt=1, examples=[0.5])] = 0.5
    seed: Annotated[int, Field(ge=0)] = 0
    fit: TunedConfig = SEAConfig()
