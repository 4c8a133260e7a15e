"""How an edit came to be: the record that is saved with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor, nn

from sealign.demonstrations.demonstration import Demonstration, demonstrations_hash
from sealign.edits.edit import Edit
from sealign.edits.record import EditRecord, EditSettings, LayerRecord, model_record
from sealign.methods.sea_config import FitConfig
from sealign.models.sites import resolve_sites
from sealign.spectral.projection import Projection
from sealign.versions import library_versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def relative_change(projection: Projection, tokens: Float[Tensor, "n d"], settings: EditSettings) -> float:
    """Return the mean over tokens of |x' - x| / |x|, 0 being no change; tokens that are zero are left out."""
    edited = projection(
        tokens,
        combine=settings.combine,  # type: ignore[arg-type]
        normalization=settings.normalization,  # type: ignore[arg-type]
        strength=settings.strength,
    )
    lengths = tokens.norm(dim=-1)
    ratios = (edited - tokens).norm(dim=-1)[lengths > 0] / lengths[lengths > 0]
    return float(ratios.mean()) if len(ratios) else 0.0


def relative_changes(
    projections: Mapping[int, Projection], neutral: Mapping[int, Float[Tensor, "n d"]], settings: EditSettings
) -> dict[int, float]:
    """Return the relative change of each layer's neutral activations."""
    return {layer: relative_change(found, neutral[layer], settings) for layer, found in projections.items()}


def build_edit(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    projections: Mapping[int, Projection],
    changes: Mapping[int, float],
    signatures: Mapping[int, float],
    config: FitConfig,
) -> Edit:
    """Join projections with the record of how they were made.

    Args:
        model, tokenizer, demonstrations, config: what the fit was made with.
        projections: by layer.
        changes: by layer, the relative change of neutral activations at the edited site.
        signatures: by layer.
    """
    sites = resolve_sites(model, config.site, sorted(projections), module_pattern=config.module_pattern)
    settings = config.settings()
    layers = {
        str(resolved.layer): _layer_record(
            resolved.path,
            projections[resolved.layer],
            changes[resolved.layer],
            signatures[resolved.layer],
        )
        for resolved in sites
    }
    record = EditRecord(
        settings=settings,
        layers=layers,
        model=model_record(model, tokenizer),
        fit=_fit_record(config, tokenizer),
        demonstrations_hash=demonstrations_hash(demonstrations),
        demonstrations_count=len(demonstrations),
        versions=library_versions(),
    )
    return Edit({resolved.layer: projections[resolved.layer] for resolved in sites}, record)


def _layer_record(module: str, projection: Projection, change: float, layer_signature: float) -> LayerRecord:
    return LayerRecord(
        module=module,
        rank_positive=projection.rank_positive,
        rank_negative=projection.rank_negative,
        explained_variance_positive=projection.explained_variance_positive,
        explained_variance_negative=projection.explained_variance_negative,
        energy_positive=projection.energy_positive,
        energy_negative=projection.energy_negative,
        relative_change=change,
        signature=layer_signature,
    )


def _fit_record(config: FitConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    fit = dataclasses.asdict(config)
    fit["prompt_format"] = dataclasses.asdict(config.prompt_format.resolve(tokenizer))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fit.items()}
