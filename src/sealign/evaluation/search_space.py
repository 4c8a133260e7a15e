"""What tuning searches: the settings of an edit, drawn by an Optuna trial."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sealign.fit_config import FitConfig
from sealign.sites import text_config, unwrap_model

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
        centered: by site, whether it may be centred, uncentred, or both.
    """

    depth: int
    sites: tuple[str, ...]
    normalizations: tuple[str, ...]
    feature_maps: tuple[str, ...]
    centered: Mapping[str, tuple[bool, ...]]

    @classmethod
    def of(cls, model: nn.Module, *, deployable: bool = False) -> SearchSpace:
        """Return the space for a model.

        Args:
            model: any decoder.
            deployable: keep to edits that weights carry exactly: linear, un-rescaled, at the output of a matrix;
                centred only where the architecture has a bias for it that is switched in its configuration.
        """
        config = text_config(unwrap_model(model))
        if not deployable:
            sites, both = ("mlp", "attention", "residual"), (True, False)
            maps = ("identity", "squared_exponential", "tanh", "elu")
            return cls(config.num_hidden_layers, sites, ("token", "none"), maps, dict.fromkeys(sites, both))
        switches = {"mlp": "mlp_bias", "attention": "attention_bias"}
        centered = {site: (True, False) if hasattr(config, name) else (False,) for site, name in switches.items()}
        return cls(config.num_hidden_layers, ("mlp", "attention"), ("none",), ("identity",), centered)

    def draw(self, trial: optuna.Trial, base: FitConfig) -> tuple[FitConfig, float]:
        """Return the settings of a trial, at full strength, and the share of the damage budget that it aims at.

        Layers are a window, or those of highest signature. The explained variance is drawn by the logarithm of what it
        leaves out, for positives and negatives apart.
        """
        site = self._choose(trial, "site", self.sites)
        count = trial.suggest_int("layer_count", 1, self.depth, log=True)
        if trial.suggest_categorical("layers", ["window", "signature"]) == "window":
            last = trial.suggest_int("last_layer", 0, self.depth - 1)
            layers: Any = tuple(range(max(0, last - count + 1), last + 1))
        else:
            layers = f"signature:{count}"
        shares = [1 - trial.suggest_float(f"left_out_{side}", 1e-3, 0.5, log=True) for side in ("positive", "negative")]
        config = dataclasses.replace(
            base,
            site=site,
            layers=layers,
            explained_variance=(shares[0], shares[1]),
            centered=self._choose(trial, f"centered_{site}", self.centered[site]),
            feature_map=self._choose(trial, "feature_map", self.feature_maps),
            normalization=self._choose(trial, "normalization", self.normalizations),
            combine=self._choose(trial, "combine", ("both", "positive", "negative")),
            strength=1.0,
        )
        return config, trial.suggest_float("damage_share", 0.2, 1.0)

    @staticmethod
    def _choose(trial: optuna.Trial, name: str, choices: tuple[Any, ...]) -> Any:
        return choices[0] if len(choices) == 1 else trial.suggest_categorical(name, choices)
