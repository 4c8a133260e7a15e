"""The settings of an edit that tuning searches, drawn by an Optuna trial."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from sealign.evaluation.tuning_config import TunedConfig
from sealign.models.output_matrices import BIAS_SWITCHES
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
            deployable: Whether to search only edits that can be merged exactly into the weights. These edits are
                affine, not rescaled, and act on the output of a matrix; they are centred only if the configuration of
                the architecture can enable a bias there.
        """
        config = text_config(unwrap_model(model))
        depth = config.num_hidden_layers
        allowed: tuple[str, ...] = get_args(type(base).model_fields["site"].annotation)
        if not deployable:
            return cls(depth, allowed, ("token", "none"), FEATURE_MAPS, centerable=allowed)
        biased = tuple(site for site, switch in BIAS_SWITCHES.items() if hasattr(config, switch))
        sites = tuple(site for site in ("mlp", "attention") if site in allowed)
        return cls(depth, sites, ("none",), ("identity",), centerable=biased)

    def draw(self, trial: optuna.Trial, base: TunedConfig) -> tuple[TunedConfig, float]:
        """Return the settings of a trial at strength 1, and the fraction of the damage budget that it may use.

        The layers are a window of consecutive layers, or the layers of highest signature. The unexplained variance, 1
        minus the explained variance, is drawn on a logarithmic scale, separately for positives and negatives. All
        trials draw the same parameters, even where the value of one makes another irrelevant, since the sampler needs
        a fixed search space.

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
        return base.replace(**drawn), trial.suggest_float("damage_fraction", 0.5, 1.0)

    @staticmethod
    def _choose(trial: optuna.Trial, name: str, choices: tuple[Any, ...]) -> Any:
        return choices[0] if len(choices) == 1 else trial.suggest_categorical(name, choices)
