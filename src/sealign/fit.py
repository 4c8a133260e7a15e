"""Demonstrations to edit, end to end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.activations import Activations, collect_activations
from sealign.covariance import CrossCovariance
from sealign.demonstrations import Demonstration
from sealign.edit import SpectralEdit
from sealign.errors import ActivationError, DegenerateError, DemonstrationError
from sealign.feature_maps import get_feature_map
from sealign.fit_config import FitConfig, Pair, select_layers
from sealign.progress import Track, no_progress
from sealign.projection import Projection
from sealign.provenance import build_edit
from sealign.sites import resolve_sites, text_config, unwrap_model
from sealign.spectra import Spectrum, leading_spectrum, signature

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
    config = FitConfig(explained_variance=explained_variance, rank=rank, centered=centered, feature_map=feature_map)
    _check_matrices(neutral, positive, negative)
    phi = get_feature_map(feature_map)
    # Phi is evaluated in float64, so that a float32 fit takes the same decisions as a float64 one.
    features = [phi.forward(matrix.detach().double()) for matrix in (neutral, positive, negative)]
    spectra = []
    for side, target, share, k in zip(
        ("positive", "negative"),
        features[1:],
        config.targets("explained_variance"),
        config.targets("rank"),
        strict=True,
    ):
        covariance = CrossCovariance(neutral.shape[1], centered=centered)
        covariance.update(features[0], target)
        try:
            spectra.append(
                leading_spectrum(
                    covariance.compute(), explained_variance=None if k is not None else share, rank=k, seed=seed
                )
            )
        except DegenerateError as error:
            raise DegenerateError(f"neutral and {side} activations: {error}") from error
    mean = features[0].mean(0) if centered else None
    return _projection(spectra, mean, feature_map, torch.promote_types(neutral.dtype, torch.float32))


def _check_matrices(neutral: Tensor, positive: Tensor, negative: Tensor) -> None:
    shapes = [tuple(matrix.shape) for matrix in (neutral, positive, negative)]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2:
        raise ActivationError(
            f"neutral, positive and negative must be three (n, d) matrices of one shape, got {shapes}"
        )
    if shapes[0][0] < 2:
        raise ActivationError(f"there are {shapes[0][0]} demonstrations, but a fit needs at least 2")
    for name, matrix in (("neutral", neutral), ("positive", positive), ("negative", negative)):
        finite = torch.isfinite(matrix).all(dim=1)
        if not bool(finite.all()):
            row = int((~finite).int().argmax())
            raise ActivationError(f"NaN or infinity in row {row} of the {name} activations; leave that row out")


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
    track: Track = no_progress,
) -> SpectralEdit:
    """Fit an edit of a model from demonstrations, in closed form and without training.

    Demonstrations of several behaviours in one list give a joint edit: all n count the same.

    Args:
        model: any decoder that ``AutoModelForCausalLM`` loads; it is not changed.
        tokenizer: the model's own.
        demonstrations: at least 2.
        config: settings of the fit.
        checkpoint_dir: where finished batches are kept, so that a killed run continues where it stopped.
        track: shows progress; see ``sealign.progress.Track``.

    Raises:
        DemonstrationError: fewer than 2, or longer than the model's context.
        ActivationError: NaN or infinity, or nothing to decompose at a layer.
        SiteError: a site or layer that the model does not have.

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

    def collect(site: str, layers: Sequence[int]) -> Activations:
        return collect_activations(
            model,
            tokenizer,
            demonstrations,
            site=site,
            layers=layers,
            config=config.collect_config(),
            module_pattern=config.module_pattern if site == config.site else None,
            checkpoint_dir=checkpoint_dir,
            track=track,
        )

    activations = collect(config.fit_site or config.site, candidates)
    layers = candidates
    if by_signature:
        layers = select_layers(config.layers, depth, layer_signatures(activations, centered=config.centered))
    edited_site = activations if activations.site == config.site else collect(config.site, layers)
    projections = fit_projections(activations, config=config, layers=layers, track=track)
    signatures = layer_signatures(activations, centered=config.centered)
    return build_edit(model, tokenizer, demonstrations, projections, edited_site.neutral, signatures, config)


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
    projections = {}
    for layer in track(chosen, "Decomposing", len(chosen)):
        try:
            projections[layer] = fit_projection(
                activations.neutral[layer],
                activations.positive[layer],
                activations.negative[layer],
                explained_variance=config.explained_variance,
                rank=config.rank,
                centered=config.centered,
                feature_map=config.feature_map,
                seed=config.seed,
            )
        except ActivationError as error:
            raise type(error)(f"layer {layer}: {error}") from error
    return projections


def layer_signatures(activations: Activations, *, centered: bool = False) -> dict[int, float]:
    """Return the signature of each collected layer; see ``sealign.spectra.signature``."""
    return {
        layer: signature(activations.positive[layer], activations.negative[layer], centered=centered)
        for layer in sorted(activations.positive)
    }
