"""Demonstrations to edit, end to end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.demonstrations.demonstration import Demonstration
from sealign.edits.edit import Edit
from sealign.edits.provenance import build_edit, relative_change, relative_changes
from sealign.errors import ActivationError, DegenerateError, DemonstrationError, WorkerError
from sealign.fitting.activation_store import Keep, choose_keep
from sealign.fitting.activations import Activations
from sealign.fitting.collected import Collected, CollectedRows, collect
from sealign.fitting.collecting import collect_activations
from sealign.fitting.layer_statistics import SAMPLE, LayerStatistics
from sealign.fitting.workers import gather_objects, own_share, rank_and_size
from sealign.methods.sea_config import FitConfig, Pair
from sealign.models.sites import resolve_sites, select_layers
from sealign.models.structure import text_config, unwrap_model
from sealign.progress import Track, no_progress
from sealign.spectral.decomposition import Spectrum, leading_spectrum
from sealign.spectral.projection import Projection
from sealign.spectral.signature import signature

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def fit_projection(
    neutral: Float[Tensor, "n d"],
    positive: Float[Tensor, "n d"],
    negative: Float[Tensor, "n d"],
    *,
    explained_variance: float | Pair = 0.998,
    rank: int | tuple[int, int] | None = None,
    centered: bool = False,
    feature_map: str = "identity",
    seed: int = 0,
) -> Projection:
    """Fit the projection of one layer from three matrices of activations.

    Omega+ = Phi(H)^T Phi(H+) / n and Omega- = Phi(H)^T Phi(H-) / n; U+ and U- are their leading left singular vectors,
    as many as reach a share K of the squared singular values (Qiu et al. 2024, arXiv 2405.09719, section 3).

    Args:
        neutral, positive, negative: H, H+ and H-, row i being demonstration i; n is at least 2.
        explained_variance: K in (0, 1], or a pair (positive, negative).
        rank: k in [1, d], or a pair, in place of ``explained_variance``.
        centered: subtract each matrix's own mean, after the feature map.
        feature_map: the name of Phi.
        seed: of iterative decompositions.

    Returns:
        A projection whose factors have the type and device of ``neutral``, at least float32.

    Raises:
        ActivationError: shapes differ, fewer than 2 rows, or NaN or infinity.
        DegenerateError: a cross-covariance is zero or has a lower rank than asked for.
        SettingError: a setting is out of range.

    Example:
        >>> import torch
        >>> h = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        >>> fit_projection(h, h + 1, h - 1, rank=(2, 1)).rank_positive
        2
    """
    config = FitConfig(
        explained_variance=explained_variance, rank=rank, centered=centered, feature_map=feature_map, seed=seed
    )
    if neutral.dim() == 2 and neutral.shape[0] < 2:
        raise ActivationError(f"there are {neutral.shape[0]} demonstrations, but a fit needs at least 2")
    statistics = LayerStatistics(neutral.shape[-1], centered=centered, feature_map=feature_map)
    statistics.update(neutral, positive, negative)
    return decompose(statistics, config)


def decompose(statistics: LayerStatistics, config: FitConfig) -> Projection:
    """Return the projection of one layer from its statistics, its factors in the type of the rows, at least float32.

    Args:
        statistics: of the layer, combined over workers.
        config: settings of the fit.

    Raises:
        DegenerateError: a cross-covariance is zero or has a lower rank than asked for.
    """
    spectra = []
    neutral = None  # the left factor of both sides, whose Gram matrix is made once
    for side, covariance, share, k in zip(
        ("positive", "negative"),
        (statistics.positive, statistics.negative),
        config.targets("explained_variance"),
        config.targets("rank"),
        strict=True,
    ):
        omega = covariance.compute(left=neutral)
        neutral = omega.left
        try:
            spectra.append(
                leading_spectrum(omega, explained_variance=None if k is not None else share, rank=k, seed=config.seed)
            )
        except DegenerateError as error:
            raise DegenerateError(f"neutral and {side} activations: {error}") from error
    mean = statistics.mean if config.centered else None
    dtype = torch.promote_types(statistics.neutral_sample.dtype, torch.float32)
    return _projection(spectra, mean, config.feature_map, dtype)


def _projection(spectra: Sequence[Spectrum], mean: Tensor | None, feature_map: str, dtype: torch.dtype) -> Projection:
    plus, minus = spectra
    return Projection(
        # Row-major, as they are read back from a file, so that a loaded edit computes the same to the bit.
        plus.vectors.to(dtype).contiguous(),
        minus.vectors.to(dtype).contiguous(),
        None if mean is None else mean.to(dtype),
        feature_map,
        plus.values.to(dtype),
        minus.values.to(dtype),
        plus.energy,
        minus.energy,
    )


def fit_edit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    *,
    config: FitConfig = FitConfig(),
    checkpoint_dir: str | Path | None = None,
    keep: Keep | None = None,
    track: Track = no_progress,
) -> Edit:
    """Fit an edit of a model from demonstrations, in closed form and without training.

    Demonstrations of several behaviours in one list give a joint edit: all n count the same. Started by ``torchrun``
    and inside ``worker_group``, each worker runs its share of the demonstrations and decomposes its share of the
    layers, and all return the same edit.

    Args:
        model: any decoder that ``AutoModelForCausalLM`` loads; it is not changed.
        tokenizer: the model's own.
        demonstrations: at least 2.
        config: settings of the fit.
        checkpoint_dir: where finished batches are kept, so that a killed run continues where it stopped.
        keep: what is kept of the activations, and where; what needs the least if None.
        track: shows progress; see ``sealign.progress.Track``.

    Raises:
        DemonstrationError: fewer than 2, or longer than the model's context.
        ActivationError: NaN or infinity, or nothing to decompose at a layer.
        SiteError: a site or layer that the model does not have.
        WorkerError: another worker ended.

    Example:
        >>> import sealign
        >>> model, tokenizer = sealign.load_model("smollm2")
        >>> demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=8)
        >>> edit = sealign.fit_edit(model, tokenizer, demonstrations, config=FitConfig(layers="last:2"))
        >>> edit.modules
        ['model.layers.28.mlp', 'model.layers.29.mlp']
    """
    if len(demonstrations) < 2:
        raise DemonstrationError(f"there are {len(demonstrations)} demonstrations, but a fit needs at least 2")
    depth = text_config(unwrap_model(model)).num_hidden_layers
    by_signature = isinstance(config.layers, str) and config.layers.startswith("signature:")
    candidates = list(range(depth)) if by_signature else select_layers(config.layers, depth)
    # Both sites are resolved before anything is run, so that a wrong one fails at once.
    resolve_sites(model, config.site, candidates, module_pattern=config.module_pattern)
    workers = rank_and_size()[1]
    if workers > 1 and getattr(unwrap_model(model), "tp_size", None):
        raise WorkerError(
            f"the model is split over the {workers} workers, which cannot share the demonstrations too; fit it outside "
            "worker_group"
        )
    share = own_share(demonstrations)
    widths = [text_config(unwrap_model(model)).hidden_size] * len(candidates)
    chosen = keep or choose_keep(len(share), widths)
    with collect(
        model, tokenizer, share, config, candidates, chosen, checkpoint_dir=checkpoint_dir, track=track
    ) as collected:
        layers = candidates
        if by_signature:
            known = {layer: _combined(collected, layer).signature for layer in candidates}
            layers = select_layers(config.layers, depth, known)
        fitted = _fit_layers(collected, layers, config, track)
    projections = {layer: projection for layer, (projection, _, _) in fitted.items()}
    changes = {layer: change for layer, (_, change, _) in fitted.items()}
    signatures = {layer: signature for layer, (_, _, signature) in fitted.items()}
    if config.fit_site not in (None, config.site):
        at_site = collect_activations(
            model,
            tokenizer,
            demonstrations[:SAMPLE],
            site=config.site,
            layers=layers,
            config=config.collect_config(),
            module_pattern=config.module_pattern,
            checkpoint_dir=checkpoint_dir,
            track=track,
        )
        changes = relative_changes(projections, at_site.neutral, config.settings())
    return build_edit(model, tokenizer, demonstrations, projections, changes, signatures, config)


def _combined(collected: Collected, layer: int) -> LayerStatistics:
    statistics = collected.statistics(layer)
    statistics.combine()
    return statistics


def _fit_layers(
    collected: Collected, layers: Sequence[int], config: FitConfig, track: Track
) -> dict[int, tuple[Projection, float, float]]:
    """Return projection, relative change and signature of each layer; each worker decomposes its share of them."""
    rank, size = rank_and_size()
    own: dict[int, tuple[Projection, float, float]] = {}
    for number, layer in enumerate(track(layers, "Decomposing", len(layers))):
        statistics = _combined(collected, layer)  # of which every worker has a part
        if number % size == rank:
            share = layer, statistics
        # Only when each worker has one to decompose, so that none waits for another's.
        if (number % size == size - 1 or number == len(layers) - 1) and number % size >= rank:
            own[share[0]] = _fit_layer(*share, config)
    return dict(sorted(item for part in gather_objects(own) for item in part.items()))


def _fit_layer(layer: int, statistics: LayerStatistics, config: FitConfig) -> tuple[Projection, float, float]:
    projection = _decompose_layer(layer, statistics, config)
    return projection, relative_change(projection, statistics.neutral_sample, config.settings()), statistics.signature


def _decompose_layer(layer: int, statistics: LayerStatistics, config: FitConfig) -> Projection:
    try:
        return decompose(statistics, config)
    except ActivationError as error:
        raise type(error)(f"layer {layer}: {error}") from error


def fit_projections(
    activations: Activations,
    *,
    config: FitConfig,
    layers: Sequence[int] | None = None,
    track: Track = no_progress,
) -> dict[int, Projection]:
    """Fit the projection of each layer from collected activations.

    Args:
        activations: of at least the layers asked for.
        config: settings of the fit.
        layers: which; all that were collected if None.
        track: shows progress.

    Raises:
        ActivationError, DegenerateError: as ``fit_projection``, naming the layer.
    """
    chosen = sorted(activations.neutral) if layers is None else list(layers)
    rows = CollectedRows(activations, config)
    return {
        layer: _decompose_layer(layer, rows.statistics(layer), config)
        for layer in track(chosen, "Decomposing", len(chosen))
    }


def layer_signatures(activations: Activations, *, centered: bool = False) -> dict[int, float]:
    """Return the signature of each collected layer; see ``sealign.spectral.signature.signature``."""
    return {
        layer: signature(activations.positive[layer], activations.negative[layer], centered=centered)
        for layer in sorted(activations.positive)
    }
