"""The pipeline that all methods which edit activations share: collect, fit each layer, build the edit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sealign.edits.edit import Edit, layer_record
from sealign.edits.layer_edit import LayerEdit
from sealign.errors import ActivationError, WorkerError
from sealign.files import tensors_hash
from sealign.fitting.activation_store import choose_keep
from sealign.fitting.activations import Activations
from sealign.fitting.collected import Collected, CollectedRows, collect
from sealign.fitting.collecting import collect_activations, resolve_reads
from sealign.fitting.edit_config import EditConfig
from sealign.fitting.layer_statistics import SAMPLE, LayerStatistics
from sealign.fitting.workers import gather_objects, own_share, rank_and_size
from sealign.methods.method import FitContext
from sealign.models.sites import resolve_sites, select_layers
from sealign.models.structure import text_config, unwrap_model


@dataclass(frozen=True)
class LayerFit:
    """What a method fits at one layer.

    Attributes:
        layer_edit: The edit of the layer.
        relative_change: Mean of |x' - x| / |x| over the neutral activations, at the configured strength.
        statistics: Further figures that the method reports of the layer.
    """

    layer_edit: LayerEdit
    relative_change: float
    statistics: Mapping[str, float]


LayerFitter = Callable[[LayerStatistics, Any], tuple[LayerEdit, Mapping[str, float]]]
"""A function from the statistics of a layer and a configuration to its edit and further figures."""


def depth_of(context: FitContext) -> int:
    """Return the number of decoder layers of the model."""
    return int(text_config(unwrap_model(context.model)).num_hidden_layers)


def candidate_layers(context: FitContext, config: EditConfig) -> list[int]:
    """Return the layers whose activations a fit needs: all of them if layers are chosen by signature."""
    depth = depth_of(context)
    return list(range(depth)) if config.chooses_by_signature else select_layers(config.layers, depth)


@contextmanager
def collected_for(context: FitContext, config: EditConfig, layers: Sequence[int]) -> Iterator[Collected]:
    """Run the model over this worker's demonstrations, and yield what is kept until the block ends.

    Args:
        context: What the method is fitted with.
        config: Settings of the method.
        layers: Layers whose activations are collected.

    Raises:
        SiteError: A site cannot be identified; raised before anything runs.
        WorkerError: The model itself is split over the workers.
    """
    model = context.model
    # Both sites are resolved first, so that a wrong one fails at once.
    resolve_sites(model, config.site, layers, module_pattern=config.module_pattern)
    resolve_reads(model, config.read_site, layers, module_pattern=read_pattern(config))
    workers = rank_and_size()[1]
    if workers > 1 and getattr(unwrap_model(model), "tp_size", None):
        raise WorkerError(
            f"the model is split over the {workers} workers, so they cannot share the demonstrations as well; fit it "
            "outside worker_group"
        )
    share = own_share(context.demonstrations)
    widths = [text_config(unwrap_model(model)).hidden_size] * len(layers)
    keep = context.keep or choose_keep(len(share), widths)
    with collect(
        model,
        context.tokenizer,
        share,
        config,
        layers,
        keep,
        checkpoint_dir=context.checkpoint_dir,
        track=context.track,
    ) as collected:
        yield collected


def read_pattern(config: EditConfig) -> str | None:
    """Return the module pattern for reading; None if activations are read at another site than they are edited."""
    return config.module_pattern if config.read_site == config.site else None


def fit_layers(context: FitContext, config: EditConfig, fitter: LayerFitter) -> dict[int, LayerFit]:
    """Collect activations and fit each layer by itself; each worker fits its share of the layers.

    Args:
        context: What the method is fitted with.
        config: Settings of the method.
        fitter: Fits one layer.
    """
    with collected_for(context, config, candidate_layers(context, config)) as collected:
        fits = fit_collected(context, config, collected, fitter)
    if config.read_site == config.site:
        return fits
    sample = collect_activations(
        context.model,
        context.tokenizer,
        context.demonstrations[:SAMPLE],
        site=config.site,
        layers=sorted(fits),
        config=config.collect_config(),
        module_pattern=config.module_pattern,
        checkpoint_dir=context.checkpoint_dir,
        track=context.track,
    )
    return {
        layer: dataclasses.replace(
            found, relative_change=found.layer_edit.relative_change(sample.neutral[layer], config.strength)
        )
        for layer, found in fits.items()
    }


def fit_collected(
    context: FitContext, config: EditConfig, collected: Collected, fitter: LayerFitter
) -> dict[int, LayerFit]:
    """Fit each chosen layer from collected activations; each worker fits its share of the layers.

    Args:
        context, config, fitter: As for ``fit_layers``.
        collected: Activations of at least the layers that the configuration may choose.

    Raises:
        ActivationError: A layer cannot be fitted; names the layer.
    """
    layers = chosen_layers(context, config, collected)
    rank, size = rank_and_size()
    own: dict[int, LayerFit] = {}
    waiting: tuple[int, LayerStatistics] | None = None
    for number, layer in enumerate(context.track(layers, "Fitting layers", len(layers))):
        statistics = collected.statistics(layer)  # adds up the parts of all workers
        if number % size == rank:
            waiting = layer, statistics
        # Fitted only when each worker has a layer, so that none waits for another's.
        if waiting and (number % size == size - 1 or number == len(layers) - 1):
            own[waiting[0]] = _fit_layer(*waiting, config, fitter)
            waiting = None
    return dict(sorted(item for part in gather_objects(own) for item in part.items()))


def chosen_layers(context: FitContext, config: EditConfig, collected: Collected) -> list[int]:
    """Return the layers that a configuration chooses among collected ones.

    Raises:
        ActivationError: A chosen layer was not collected.
    """
    signatures = None
    if config.chooses_by_signature:
        signatures = {layer: collected.statistics(layer).signature for layer in collected.layers}
    layers = select_layers(config.layers, depth_of(context), signatures)
    missing = sorted(set(layers) - set(collected.layers))
    if missing:
        raise ActivationError(
            f"layer {missing[0]} is to be edited, but its activations were not collected; collect layers {layers}"
        )
    return layers


def _fit_layer(layer: int, statistics: LayerStatistics, config: EditConfig, fitter: LayerFitter) -> LayerFit:
    try:
        layer_edit, figures = fitter(statistics, config)
    except ActivationError as error:
        raise type(error)(f"layer {layer}: {error}") from error
    change = layer_edit.relative_change(statistics.neutral_sample, config.strength)
    return LayerFit(layer_edit, change, {**figures, "signature": statistics.signature})


def collected_rows(config: EditConfig, activations: Activations) -> CollectedRows:
    """Return activations that were collected before, as a fit takes them.

    Raises:
        ActivationError: They were read at another site than the configuration asks for.
    """
    if activations.site != config.read_site:
        raise ActivationError(
            f"the activations were read at the site '{activations.site}', but {type(config).__name__} needs "
            f"'{config.read_site}'; collect them there"
        )
    return CollectedRows(activations, config)


def build_edit(
    context: FitContext,
    method: str,
    config: EditConfig,
    fits: Mapping[int, LayerFit],
    *,
    learned: Mapping[str, Any] | None = None,
) -> Edit:
    """Join the edits of all layers and the record of how they were made.

    Args:
        context: What the method was fitted with.
        method: Name of the method.
        config: Settings of the method.
        fits: By layer.
        learned: Results of the fit that are not tensors.
    """
    sites = resolve_sites(context.model, config.site, sorted(fits), module_pattern=config.module_pattern)
    layer_edits = {site.layer: fits[site.layer].layer_edit for site in sites}
    first = next(iter(layer_edits.values()))
    record = context.record(
        method,
        config,
        learned=dict(learned or {}),
        strength=float(config.strength),
        site=config.site,
        normalization=first.normalization,
        feature_map=first.feature_map,
        combine=getattr(first, "combine", None),
        layers={
            str(site.layer): layer_record(
                site.path,
                fits[site.layer].layer_edit,
                fits[site.layer].relative_change,
                fits[site.layer].statistics,
            )
            for site in sites
        },
    )
    edit = Edit(layer_edits, record)
    return Edit(layer_edits, dataclasses.replace(record, tensors_hash=tensors_hash(edit.tensors())))
