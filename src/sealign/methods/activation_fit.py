"""Pipeline of all methods that edit activations: collect, fit each layer, build the edit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sealign.edits.affine_edit import AffineEdit
from sealign.edits.edit import Edit, layer_record
from sealign.edits.gate import Gate
from sealign.edits.layer_edit import LayerEdit
from sealign.errors import ActivationError, SettingError, WorkerError
from sealign.files import tensors_hash
from sealign.fitting.activation_store import choose_keep
from sealign.fitting.activations import Activations
from sealign.fitting.collected import Collected, collect
from sealign.fitting.collecting import collect_activations, read_width, resolve_read_sites
from sealign.fitting.collector import Collector
from sealign.fitting.edit_config import EditConfig
from sealign.fitting.layer_statistics import SAMPLE, LayerStatistics
from sealign.fitting.workers import gather_objects, own_share, rank_and_size
from sealign.methods.gate_fit import fit_gates
from sealign.methods.method import FitContext, Method
from sealign.models.sites import resolve_sites, select_layers
from sealign.models.structure import text_config, unwrap_model


@dataclass(frozen=True)
class LayerFit:
    """Result of a fit at one layer.

    Attributes:
        layer_edit: The edit of the layer.
        relative_change: Mean of |x' - x| / |x| over the neutral activations, at the configured strength.
        statistics: Further figures that the method reports for the layer.
    """

    layer_edit: LayerEdit
    relative_change: float
    statistics: Mapping[str, float]


LayerFitter = Callable[[LayerStatistics, Any], tuple[LayerEdit, Mapping[str, float]]]
"""Function from the statistics of a layer and a configuration to the edit of the layer and further figures."""

CollectedFitter = Callable[[FitContext, Collected, Any], Edit]
"""Function from the activations of all collected layers and a configuration to an edit."""


def activation_method(
    name: str, config: type[EditConfig], fitter: CollectedFitter, *, packages: tuple[str, ...] = ()
) -> Method:
    """Return a method that is fitted from the activations of one pass over the demonstrations.

    Args:
        name: Name of the method.
        config: Type of its configuration.
        fitter: Fits the edit from collected activations.
        packages: Import names of the optional packages that it needs.
    """

    def fit(context: FitContext, settings: EditConfig) -> Edit:
        with collect_for(context, settings) as collected:
            return fitter(context, collected, settings)

    def fit_activations(context: FitContext, activations: Activations, settings: EditConfig) -> Edit:
        check_settings(context, settings)
        return fitter(context, collected_before(settings, activations), settings)

    return Method(name, config, Edit, fit, fit_activations, packages=packages)


def layerwise_method(name: str, config: type[EditConfig], fitter: LayerFitter) -> Method:
    """Return a method that fits each layer by itself from the statistics of the layer.

    Args:
        name: Name of the method.
        config: Type of its configuration.
        fitter: Fits one layer.
    """

    def fit(context: FitContext, collected: Collected, settings: EditConfig) -> Edit:
        return build_edit(context, name, settings, fit_layers(context, settings, collected, fitter))

    return activation_method(name, config, fit)


@contextmanager
def collect_for(context: FitContext, config: EditConfig) -> Iterator[Collected]:
    """Run the model over the demonstrations of this worker, and yield the activations, which last until the block ends.

    Args:
        context: Inputs of the fit.
        config: Settings of the method.

    Raises:
        SiteError, SettingError, DegenerateError: A site cannot be identified, or a setting asks for more than there
            is; raised before the model runs over the demonstrations.
        WorkerError: The model is split over the workers, or there are more workers than demonstrations.
    """
    check_settings(context, config)
    model, layers = context.model, candidate_layers(context, config)
    resolve_sites(model, config.site, layers, module_pattern=config.module_pattern)
    sites = resolve_read_sites(model, config.read_site, layers, module_pattern=config.read_pattern)
    workers = rank_and_size()[1]
    if workers > 1 and getattr(unwrap_model(model), "tp_size", None):
        raise WorkerError(
            f"the model is split over the {workers} workers, so the demonstrations cannot be divided among them; "
            "fit it outside worker_group"
        )
    if workers > len(context.demonstrations):
        raise WorkerError(
            f"there are {workers} workers for {len(context.demonstrations)} demonstrations; start at most as many "
            "workers as there are demonstrations"
        )
    share = own_share(context.demonstrations)
    widths = [read_width(model, sites[0])] * len(layers)
    keep = context.keep or choose_keep(len(share), widths, needs_rows=config.needs_rows)
    collector = Collector(
        model,
        context.tokenizer,
        {config.read_site: sites},
        [config.token],
        config.collect_config(),
        context.track,
    )
    with collect(collector, share, config, keep, checkpoint_dir=context.checkpoint_dir) as collected:
        yield collected


def check_settings(context: FitContext, config: EditConfig) -> None:
    """Raise an error if the layers are outside the model, or if a setting asks for more than there is.

    Args:
        context: Inputs of the fit.
        config: Settings of the method.
    """
    depth = model_depth(context)
    layers = select_layers(config.layers, depth, dict.fromkeys(range(depth), 0.0))
    config.check_available(len(context.demonstrations), len(layers), text_config(unwrap_model(context.model)))


def collected_before(config: EditConfig, activations: Activations) -> Collected:
    """Return activations that were collected before, in the form that a fit takes.

    Args:
        config: Settings of the method.
        activations: Activations of at least the layers that the configuration chooses.

    Raises:
        ActivationError: The activations were read at another site than the configuration needs.
        WorkerError: The function is called in a worker group, which would count each row several times.
    """
    if rank_and_size()[1] > 1:
        raise WorkerError(
            "activations that were collected before are fitted by one process; do so outside worker_group"
        )
    if activations.site != config.read_site:
        raise ActivationError(
            f"the activations were read at the site '{activations.site}', but {type(config).__name__} needs "
            f"'{config.read_site}'; collect them there"
        )
    return Collected(activations, config)


def model_depth(context: FitContext) -> int:
    """Return the number of decoder layers of the model."""
    return int(text_config(unwrap_model(context.model)).num_hidden_layers)


def candidate_layers(context: FitContext, config: EditConfig) -> list[int]:
    """Return the layers whose activations a fit needs: all of them if layers are chosen by signature."""
    depth = model_depth(context)
    return list(range(depth)) if config.chooses_by_signature else select_layers(config.layers, depth)


def chosen_layers(context: FitContext, config: EditConfig, collected: Collected) -> list[int]:
    """Return the layers that a configuration chooses among collected ones.

    Args:
        context, config, collected: As for ``fit_layers``.

    Raises:
        ActivationError: A chosen layer was not collected.
    """
    missing = sorted(set(candidate_layers(context, config)) - set(collected.layers))
    if missing:
        raise ActivationError(
            f"layers is '{config.layers}', but the activations of layer {missing[0]} were not collected; collect them, "
            f"or choose among the layers {collected.layers}"
        )
    signatures = None
    if config.chooses_by_signature:
        signatures = {layer: collected.statistics(layer).signature for layer in collected.layers}
    return select_layers(config.layers, model_depth(context), signatures)


def fit_layers(
    context: FitContext, config: EditConfig, collected: Collected, fitter: LayerFitter
) -> dict[int, LayerFit]:
    """Fit each chosen layer separately; the workers divide the layers among themselves.

    Args:
        context: Inputs of the fit.
        config: Settings of the method.
        collected: Activations of at least the layers that the configuration chooses.
        fitter: Fits one layer.

    Raises:
        ActivationError: A layer cannot be fitted or was not collected; names the layer.
    """
    layers = chosen_layers(context, config, collected)
    rank, size = rank_and_size()
    own: dict[int, LayerFit] = {}
    waiting: tuple[int, LayerStatistics] | None = None
    for number, layer in enumerate(context.track(layers, "Fitting layers", len(layers))):
        statistics = collected.statistics(layer)  # combines the statistics of all workers
        if number % size == rank:
            waiting = layer, statistics
        # A layer is fitted only when each worker has one, so that no worker waits for the fit of another.
        if waiting and (number % size == size - 1 or number == len(layers) - 1):
            own[waiting[0]] = _fit_layer(*waiting, config, fitter)
            waiting = None
    fits = dict(sorted(item for part in gather_objects(own) for item in part.items()))
    return fits if config.read_site == config.site else _with_changes_at_site(context, config, fits)


def _fit_layer(layer: int, statistics: LayerStatistics, config: EditConfig, fitter: LayerFitter) -> LayerFit:
    try:
        layer_edit, figures = fitter(statistics, config)
    except ActivationError as error:
        raise type(error)(f"layer {layer}: {error}") from error
    change = layer_edit.relative_change(statistics.neutral_sample, config.strength)
    return LayerFit(layer_edit, change, {**figures, "signature": statistics.signature})


def _with_changes_at_site(context: FitContext, config: EditConfig, fits: Mapping[int, LayerFit]) -> dict[int, LayerFit]:
    """Return fits of one site with the relative changes at another, where they act; the model is run there."""
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
    changes = {
        layer: found.layer_edit.relative_change(sample.neutral[layer], config.strength) for layer, found in fits.items()
    }
    return {layer: dataclasses.replace(found, relative_change=changes[layer]) for layer, found in fits.items()}


def _weighted(fit: LayerFit, weight: float) -> LayerFit:
    """Return the fit of a layer with its change multiplied by a weight."""
    if not isinstance(fit.layer_edit, AffineEdit):
        raise SettingError("layer_weights are given, but an edit with a feature map is not linear; leave them out")
    change = abs(weight) * fit.relative_change
    return dataclasses.replace(fit, layer_edit=fit.layer_edit.scaled(weight), relative_change=change)


def _gated(fit: LayerFit, gate: Gate, shares: Mapping[str, float]) -> LayerFit:
    """Return the fit of a layer with a gate; its relative change stays that of the tokens for which it is open."""
    layer_edit = dataclasses.replace(fit.layer_edit, gate=gate)
    return dataclasses.replace(fit, layer_edit=layer_edit, statistics={**fit.statistics, **shares})


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
        context: Inputs of the fit.
        method: Name of the method.
        config: Settings of the method.
        fits: Mapping from layer to the result of its fit.
        learned: Results of the fit that are not tensors.
    """
    sites = resolve_sites(context.model, config.site, sorted(fits), module_pattern=config.module_pattern)
    if config.layer_weights is not None:
        weights = dict(zip(sorted(fits), map(float, config.layer_weights), strict=True))
        fits = {layer: _weighted(found, weights[layer]) for layer, found in fits.items()}
    if config.gate is not None:
        gates = fit_gates(context, config, sorted(fits))
        fits = {layer: _gated(found, *gates[layer]) for layer, found in fits.items()}
    layer_edits = {layer: fits[layer].layer_edit for layer in sorted(fits)}
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
                layer_edits[site.layer],
                fits[site.layer].relative_change,
                fits[site.layer].statistics,
            )
            for site in sites
        },
    )
    edit = Edit(layer_edits, record)
    return dataclasses.replace(edit, record=dataclasses.replace(record, tensors_hash=tensors_hash(edit.tensors())))
