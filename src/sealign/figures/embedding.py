"""Project activations to two dimensions with PCA or t-SNE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sealign.errors import ActivationError, DemonstrationError, SiteError, check_choice
from sealign.figures.points import Point
from sealign.fitting.activations import Activations

Embedding = Literal["pca", "tsne"]
"""Method of projection to two dimensions: the first two principal components, or t-SNE."""

FEWEST = 5
"""Smallest number of demonstrations for t-SNE; with fewer, the perplexity would be below 3."""


def check_embedding(embedding: str, count: int) -> None:
    """Raise an error if a number of demonstrations is too small for a projection, or the projection is unknown.

    Args:
        embedding: ``pca`` or ``tsne``.
        count: Number of demonstrations.

    Raises:
        SettingError: The embedding is unknown.
        DemonstrationError: There are fewer demonstrations than ``FEWEST`` for t-SNE.
    """
    check_choice("embedding", embedding, get_args(Embedding))
    if embedding == "tsne" and count < FEWEST:
        raise DemonstrationError(f"there are {count} demonstrations, but t-SNE needs at least {FEWEST}; add some")


def first_middle_last(layers: Sequence[int]) -> list[int]:
    """Return the first, the middle and the last of some layers, without repetition.

    Args:
        layers: Indices of the layers in ascending order; must not be empty.

    Example:
        >>> first_middle_last(range(30))
        [0, 15, 29]
    """
    return sorted({layers[0], layers[len(layers) // 2], layers[-1]})


def tsne_points(activations: Activations, layers: Sequence[int] | None = None, *, seed: int = 0) -> list[Point]:
    """Return the positives and negatives of each layer, projected to two dimensions by t-SNE.

    t-SNE (van der Maaten and Hinton 2008) preserves neighbourhoods; distances and directions are not meaningful. The
    perplexity is min(30, (points - 1) / 3), and the initial positions are the first two principal components.

    Args:
        activations: Activations of at least ``FEWEST`` demonstrations.
        layers: Layers to embed; the first, the middle and the last collected layer if None.
        seed: Random seed.

    Raises:
        SiteError: A layer was not collected.
        DemonstrationError: There are fewer demonstrations than ``FEWEST``.

    Example:
        >>> import torch
        >>> h = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        >>> points = tsne_points(Activations("mlp", {3: h}, {3: h + 9}, {3: h - 9}))
        >>> len(points), points[6].panel, points[6].series
        (12, 'layer 3', 'negative')
    """
    positive, negative = activations.positive, activations.negative
    collected = sorted(positive)
    return [
        point
        for layer in _chosen(first_middle_last(collected) if layers is None else layers, collected)
        for point in _embed(layer, {"positive": positive[layer], "negative": negative[layer]}, "tsne", seed)
    ]


def effect_points(
    before: Activations,
    after: Activations,
    layers: Sequence[int] | None = None,
    *,
    embedding: Embedding = "pca",
    seed: int = 0,
) -> list[Point]:
    """Return the positives, negatives, neutrals and edited neutrals of each layer, projected together.

    PCA is the default: it is one linear map for all four groups, so distances and directions in the figure are
    projections of the true ones, and the panel title gives the explained variance. t-SNE shows only which activations
    are neighbours; a mild edit may appear large, or not at all.

    Args:
        before: Activations of the base model.
        after: Activations of the edited model on the same demonstrations; only the neutrals are used.
        layers: Layers to embed; the last layer that was collected in both if None.
        embedding: ``pca`` or ``tsne``.
        seed: Random seed of t-SNE.

    Raises:
        SiteError: A layer was not collected.
        ActivationError: The neutrals differ in shape.
        SettingError, DemonstrationError: As for ``check_embedding``.

    Example:
        >>> import torch
        >>> h = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        >>> before = Activations("mlp", {0: h}, {0: h + 1}, {0: h - 1})
        >>> after = Activations("mlp", {0: h + 0.5}, {0: h}, {0: h})
        >>> [point.series for point in effect_points(before, after)][::4]
        ['positive', 'negative', 'neutral', 'edited neutral']
    """
    collected = sorted(set(before.neutral) & set(after.neutral))
    points: list[Point] = []
    for layer in _chosen(collected[-1:] if layers is None else layers, collected):
        neutral, edited = before.neutral[layer], after.neutral[layer]
        if neutral.shape != edited.shape:
            shapes = f"{tuple(neutral.shape)} before and {tuple(edited.shape)} after the edit"
            raise ActivationError(f"layer {layer}: neutrals are {shapes}; collect both from the same demonstrations")
        groups = {"positive": before.positive[layer], "negative": before.negative[layer], "neutral": neutral}
        points += _embed(layer, groups | {"edited neutral": edited}, embedding, seed)
    return points


def _chosen(layers: Sequence[int], collected: Sequence[int]) -> list[int]:
    missing = [layer for layer in layers if layer not in collected]
    if missing or not layers:
        problem = f"layers {missing} were not collected" if missing else "no layer is named"
        raise SiteError(f"{problem}; collect them, or name one or more of {list(collected)}")
    return list(layers)


def _embed(layer: int, groups: Mapping[str, Tensor], embedding: Embedding, seed: int) -> list[Point]:
    check_embedding(embedding, min(block.shape[0] for block in groups.values()))
    matrix = torch.cat(list(groups.values())).double().cpu().numpy()
    panel = f"layer {layer}"
    if embedding == "tsne":
        places = _tsne(matrix, seed)
    else:
        from sklearn.decomposition import PCA

        pca = PCA(2, svd_solver="full").fit(matrix)
        places = pca.transform(matrix)
        panel += f": {pca.explained_variance_ratio_.sum():.0%} of variance"
    series = [name for name, block in groups.items() for _ in range(block.shape[0])]
    return [Point(panel, name, float(x), float(y)) for name, (x, y) in zip(series, places, strict=True)]


def _tsne(matrix: Any, seed: int) -> Any:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(30.0, (matrix.shape[0] - 1) / 3)
    # Use one thread: the summation order would otherwise change the result.
    with threadpool_limits(1):
        return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(matrix)
