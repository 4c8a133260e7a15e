"""The settings of an edit that tuning searches, drawn by an Optuna trial."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from sealign.evaluation.tuning_config import TunedConfig
from sealign.models.structure import text_config, unwrap_model

if TYPE_CHECKING:
    import optuna
    from torch import nn

FEATURE_MAPS = ("identity", "squared_exponential", "tanh", "elu")


@dataclass(frozen=True)
class SearchSpace:
    """The settings that a trial may draw.

    Attributes:
        depth: Number of layers of the model.
        sites: Sites at which the edit may act.
        normalizations: Ways to rescale the edited activation.
        feature_maps: Feature maps.
        centerable: Sites at which the edit may be centred.
    """

    depth: int
    sites: tuple[str, ...]
    normalizations: tuple[str, ...]
    feature_maps: tuple[str, ...]
    centerable: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, base: TunedConfig, *, deployable: bool = False) -> SearchSpace:
        """Return the search space of a model.

        Args:
            model: Any decoder.
            base: Configuration of the method; only settings that it has are searched.
            deployable: Whether to search only edits that weights carry exactly: linear, not rescaled, at the output of
                a matrix, and centred only if the architecture has a bias there that its configuration switches on.
        """
        config = text_config(unwrap_model(model))
        depth = config.num_hidden_layers
        allowed: tuple[str, ...] = get_args(type(base).model_fields["site"].annotation)
        if not deployable:
            return cls(depth, allowed, ("token", "none"), FEATURE_MAPS, centerable=allowed)
        switches = {"mlp": "mlp_bias", "attention": "attention_bias"}
        biased = tuple(site for site, switch in switches.items() if hasattr(config, switch))
        sites = tuple(site for site in switches if site in allowed)
        return cls(depth, sites, ("none",), ("identity",), centerable=biased)

    def draw(self, trial: optuna.Trial, base: TunedConfig) -> tuple[TunedConfig, float]:
        """Return the settings of a trial at strength 1, and the share of the damage budget that it aims at.

        Layers are a window, or those of highest signature. The explained variance is drawn by the logarithm of the
        share that it leaves out, separately for positives and negatives. All trials draw the same parameters, even
        those that another one makes irrelevant, since the sampler learns from a fixed space.

        Args:
            trial: Trial of the study.
            base: Configuration of the method, with the settings that are not searched.
        """
        site = self._choose(trial, "site", self.sites)
        count = trial.suggest_int("layer_count", 1, self.depth, log=True)
        last = trial.suggest_int("last_layer", 0, self.depth - 1)
        windowed = trial.suggest_categorical("layers", ["window", "signature"]) == "window"
        layers: Any = tuple(range(max(0, last - count + 1), last + 1)) if windowed else f"signature:{count}"
        drawn: dict[str, Any] = {"site": site, "layers": layers, "strength": 1.0}
        searched = type(base).model_fields
        if "centered" in searched:
            drawn["centered"] = trial.suggest_categorical("centered", [True, False]) and site in self.centerable
        if "explained_variance" in searched:
            drawn["rank"] = None
            drawn["explained_variance"] = tuple(
                1 - trial.suggest_float(f"left_out_{side}", 1e-3, 0.5, log=True) for side in ("positive", "negative")
            )
        for name, choices in (
            ("feature_map", self.feature_maps),
            ("normalization", self.normalizations),
            ("combine", ("both", "positive", "negative")),
        ):
            if name in searched:
                drawn[name] = self._choose(trial, name, choices)
        return base.replace(**drawn), trial.suggest_float("damage_share", 0.5, 1.0)

    @staticmethod
    def _choose(trial: optuna.Trial, name: str, choices: tuple[Any, ...]) -> Any:
        return choices[0] if len(choices) == 1 else trial.suggest_categorical(name, choices)
