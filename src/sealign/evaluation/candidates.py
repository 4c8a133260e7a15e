"""Candidates: edits among which tuning chooses, each of one method at one site, token choice and layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sealign.demonstrations.bundled import ordinary_texts
from sealign.demonstrations.demonstration import Demonstration
from sealign.edits.edit import Edit
from sealign.errors import DegenerateError
from sealign.fitting.activations import Activations
from sealign.fitting.collect_config import TokenChoice
from sealign.fitting.collecting import collect_together
from sealign.fitting.edit_config import EditConfig
from sealign.fitting.token_activations import collect_token_activations
from sealign.methods.difference_operator import DifferenceOperatorConfig
from sealign.methods.iti import ITIConfig
from sealign.methods.leace import LEACEConfig
from sealign.methods.mean_difference import MeanDifferenceConfig
from sealign.methods.registry import fit_edit_from_activations, method_of
from sealign.methods.sea import SEAConfig
from sealign.methods.targeted_shift import TargetedShiftConfig
from sealign.models.passages import text_passages
from sealign.models.sites import resolve_sites
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEARCHED: Mapping[str, Sequence[EditConfig]] = {
    "difference_operator": [DifferenceOperatorConfig()],
    "targeted_shift": [TargetedShiftConfig()],
    "mean_difference": [MeanDifferenceConfig()],
    "sea": [SEAConfig(explained_variance=value, centered=True) for value in (0.9, 0.998)],
    "leace": [LEACEConfig()],
    "iti": [ITIConfig()],
}
"""Settings of each method that tuning searches; sites, tokens and layers are searched besides."""


@dataclass(frozen=True)
class Candidate:
    """A candidate, fitted.

    Attributes:
        config: Its configuration: method, site, token choice, layers.
        edit: The edit, at strength 1.
    """

    config: EditConfig
    edit: Edit

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.edit.method

    @property
    def is_lora(self) -> bool:
        """Whether the edit is exactly a LoRA: linear, without a constant part, on the output of a matrix."""
        if self.edit.site == "residual" or not self.edit.is_affine or self.edit.normalization != "none":
            return False
        edits = self.edit.affine_edits.values()
        return all(not each.scale and each.constant_part() is None for each in edits)

    def describe(self) -> str:
        """Return method, site, layers, token choice and the settings that tuning searches, in a line."""
        layers = ", ".join(map(str, self.edit.layers))
        if self.config.layer_weights is not None:
            pairs = zip(self.edit.layers, map(float, self.config.layer_weights), strict=True)
            layers = ", ".join(f"{layer} (x {weight:.2f})" for layer, weight in pairs)
        value = getattr(self.config, "explained_variance", None)
        more = "" if value is None else f", K {value:g}"
        return f"{self.method}, {self.config.site} {layers}, {self.config.token} token{more}"


def candidate_configs(
    methods: Sequence[str],
    sites: Sequence[str],
    tokens: Sequence[str],
    layers: Sequence[int],
    *,
    deployable: bool = False,
) -> Iterator[EditConfig]:
    """Yield the configuration of every candidate family; each is fitted at all layers and then split by layer.

    Args:
        methods: Names in ``SEARCHED``.
        sites: Sites; a method with a site of its own has one family for all of them.
        tokens: Token choices.
        layers: Indices of the layers.
        deployable: Whether SEA is neither rescaled nor centred, so that it is exactly a LoRA.
    """
    for method in methods:
        for base in SEARCHED[method]:
            own = type(base).model_fields["site"].default
            for site in [own] if method == "iti" else sites:
                for token in tokens:
                    changes: dict[str, Any] = {"site": site, "token": token, "layers": tuple(layers), "strength": 1.0}
                    if deployable and isinstance(base, SEAConfig):
                        changes |= {"normalization": "none", "centered": False}
                    yield base.replace(**changes)


def combine(candidates: Sequence[Candidate], weights: Sequence[float]) -> Candidate:
    """Return the candidate that edits the layers of several candidates together, each with a weight.

    Args:
        candidates: Candidates of one method, site and token choice, each of one layer, which must be different.
        weights: Factors of their changes.
    """
    order = sorted(range(len(candidates)), key=lambda index: candidates[index].edit.layers)
    chosen = [(candidates[index], float(weights[index])) for index in order]
    layers = tuple(layer for each, _ in chosen for layer in each.edit.layers)
    config = chosen[0][0].config.replace(layers=layers, layer_weights=tuple(weight for _, weight in chosen))
    layer_edits = {
        layer: own.scaled(weight) for each, weight in chosen for layer, own in each.edit.affine_edits.items()
    }
    records = {name: own for each, _ in chosen for name, own in each.edit.record.layers.items()}
    record = dataclasses.replace(chosen[0][0].edit.record, layers=records, config=config.dump())
    return Candidate(config, Edit(layer_edits, record))


def collect_for_candidates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    configs: Sequence[EditConfig],
    *,
    checkpoint_dir: Any = None,
    track: Track = no_progress,
) -> dict[tuple[str, TokenChoice], Activations]:
    """Return the activations that candidate families are fitted on, by site and token choice, from one pass.

    Args:
        model: The base model.
        tokenizer: Tokenizer of the model.
        demonstrations: Demonstrations to fit on.
        configs: Configurations of the families, which differ in method, site, token choice and layers.
        checkpoint_dir: Folder for finished batches, from which an interrupted run continues.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.
    """
    layers = sorted({int(layer) for config in configs for layer in config.layers})
    collected = collect_together(
        model,
        tokenizer,
        demonstrations,
        sites=list(dict.fromkeys(config.read_site for config in configs)),
        tokens=list(dict.fromkeys(config.token for config in configs)),
        layers=layers,
        config=configs[0].collect_config(),
        checkpoint_dir=checkpoint_dir,
        track=track,
    )
    passages = text_passages(tokenizer, ordinary_texts())
    texts: dict[str, Any] = {
        site: collect_token_activations(model, tokenizer, passages, resolve_sites(model, site, layers), track=track)
        for site in dict.fromkeys(config.site for config in configs if isinstance(config, TargetedShiftConfig))
    }
    return {key: dataclasses.replace(own, text=texts.get(key[0])) for key, own in collected.items()}


def fit_candidates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    configs: Sequence[EditConfig],
    collected: Mapping[tuple[str, TokenChoice], Activations],
    *,
    track: Track = no_progress,
) -> list[Candidate]:
    """Fit every configuration, and split the edits by layer.

    An edit that is fitted over several layers together, such as ITI's, is one candidate. A layer at which a method has
    nothing to fit is left out.

    Args:
        model: The base model.
        tokenizer: Tokenizer of the model.
        demonstrations: Demonstrations to fit on.
        configs: Configurations of the families, with explicit layers.
        collected: Activations by site and token choice; see ``collect_for_candidates``.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.
    """
    found: list[Candidate] = []
    for config in track(configs, "Fitting candidates", len(configs)):
        activations = collected[config.read_site, config.token]
        found += _fit_family(model, tokenizer, demonstrations, activations, config)
    return found


def _fit_family(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    activations: Activations,
    config: EditConfig,
) -> list[Candidate]:
    """Fit one configuration and split it by layer."""

    def fit(part: EditConfig) -> Edit:
        edit = fit_edit_from_activations(model, tokenizer, activations, demonstrations, config=part)
        assert isinstance(edit, Edit), method_of(part).name
        return edit

    if isinstance(config, ITIConfig):
        return [Candidate(config, fit(config))]
    parts = [config.replace(layers=(int(layer),)) for layer in config.layers]
    if not config.needs_pass_per_layer:
        try:
            whole = fit(config)
            return [Candidate(part, whole.with_layers(part.layers)) for part in parts]  # type: ignore[arg-type]
        except DegenerateError:
            pass  # at one of the layers; the others are candidates
    found = []
    for part in parts:
        with suppress(DegenerateError):
            found.append(Candidate(part, fit(part)))
    return found
