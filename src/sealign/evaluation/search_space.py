"""What tuning searches: the settings of an edit, drawn by an Optuna trial."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sealign.methods.sea_config import FitConfig
from sealign.models.sites import SITES
from sealign.models.structure import text_config, unwrap_model

if TYPE_CHECKING:
    import optuna
    from torch import nn


@dataclass(frozen=True)
class SearchSpace:
    """The settings that a trial may draw.

    Attributes:
        depth: number of layers of the model.
        sites: where the edit may act.
        normalizations: how it may be rescaled.
        feature_maps: which maps it may use.
        centerable: sites at which it may be centred.
    """

    depth: int
    sites: tuple[str, ...]
    normalizations: tuple[str, ...]
    feature_maps: tuple[str, ...]
    centerable: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, *, deployable: bool = False) -> SearchSpace:
        """Return the space for a model.

        Args:
            model: any decoder.
            deployable: keep to edits that weights carry exactly: linear, un-rescaled, at the output of a matrix;
                centred only where the architecture has a bias for it that is switched in its configuration.
        """
        config = text_config(unwrap_model(model))
        depth = config.num_hidden_layers
        if not deployable:
            maps = ("identity", "squared_exponential", "tanh", "elu")
            return cls(depth, SITES, ("token", "none"), maps, centerable=SITES)
        switches = {"mlp": "mlp_bias", "attention": "attention_bias"}
        biased = tuple(site for site, switch in switches.items() if hasattr(config, switch))
        return cls(depth, ("mlp", "attention"), ("none",), ("identity",), centerable=biased)

    def draw(self, trial: optuna.Trial, base: FitConfig) -> tuple[FitConfig, float]:
        """Return the settings of a trial, at full strength, and the share of the damage budget that it aims at.

        Layers are a window, or those of highest signature. The explained variance is drawn by the logarithm of what it
        leaves out, for positives and negatives apart. Every trial draws every parameter, also where another makes it
        idle, since the sampler learns from a space that stays the same.
        """
        site = self._choose(trial, "site", self.sites)
        count = trial.suggest_int("layer_count", 1, self.depth, log=True)
        last = trial.suggest_int("last_layer", 0, self.depth - 1)
        windowed = trial.suggest_categorical("layers", ["window", "signature"]) == "window"
        layers: Any = tuple(range(max(0, last - count + 1), last + 1)) if windowed else f"signature:{count}"
        centered = trial.suggest_categorical("centered", [True, False])
        shares = [1 - trial.suggest_float(f"left_out_{side}", 1e-3, 0.5, log=True) for side in ("positive", "negative")]
        config = dataclasses.replace(
            base,
            site=site,
            layers=layers,
            explained_variance=(shares[0], shares[1]),
            centered=centered and site in self.centerable,
            feature_map=self._choose(trial, "feature_map", self.feature_maps),
            normalization=self._choose(trial, "normalization", self.normalizations),
            combine=self._choose(trial, "combine", ("both", "positive", "negative")),
            strength=1.0,
        )
        return config, trial.suggest_float("damage_share", 0.5, 1.0)

    @staticmethod
    def _choose(trial: optuna.Trial, name: str, choices: tuple[Any, ...]) -> Any:
        return choices[0] if len(choices) == 1 else trial.suggest_categorical(name, choices)
