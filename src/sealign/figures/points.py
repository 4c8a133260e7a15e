"""What figures draw: activations in a plane, spectra, signatures, effects of an edit and scores, as lists of marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.errors import ActivationError, DemonstrationError, SettingError, SiteError, check_choice
from sealign.fitting.activations import Activations
from sealign.spectral.cross_covariance import CrossCovariance
from sealign.spectral.decomposition import leading_spectrum
from sealign.spectral.projection import Projection

Method = Literal["pca", "tsne"]
"""How activations are laid in a plane: by the linear map that keeps most of their variance, or by t-SNE."""

Spectra = Mapping[int, tuple[Float[Tensor, " p"], Float[Tensor, " q"]]]
"""By layer, the singular values of Omega+ and of Omega-, falling; the two may differ in number."""

FEWEST = 5
"""Demonstrations that t-SNE needs at least: with fewer, its perplexity would be under 3 neighbours."""


@dataclass(frozen=True)
class Mark:
    """A point that a figure draws.

    Attributes:
        panel: title of the panel; empty in a figure of one.
        series: what the point belongs to, as the legend has it; activations stand in the order of demonstrations.
        x, y: in the units that the axes name.
        low, high: ends of a band about y; None where there is none.
    """

    panel: str
    series: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


def check_method(method: str, count: int) -> None:
    """Raise where a method cannot lay the activations of a number of demonstrations in a plane.

    Raises:
        SettingError: the method is not one of ``pca`` and ``tsne``.
        DemonstrationError: fewer demonstrations than ``FEWEST`` for t-SNE.
    """
    check_choice("method", method, get_args(Method))
    if method == "tsne" and count < FEWEST:
        raise DemonstrationError(f"there are {count} demonstrations, but t-SNE needs at least {FEWEST}; add some")


def first_middle_last(layers: Sequence[int]) -> list[int]:
    """Return the first, the middle and the last of some layers, each once.

    Example:
        >>> first_middle_last(range(30))
        [0, 15, 29]
    """
    return sorted({layers[0], layers[len(layers) // 2], layers[-1]})


def tsne_points(activations: Activations, layers: Sequence[int] | None = None, *, seed: int = 0) -> list[Mark]:
    """Return positives and negatives of each layer, laid in a plane of its own by t-SNE.

    t-SNE (van der Maaten and Hinton 2008) keeps neighbours together; lengths and directions mean nothing. Its
    perplexity is min(30, (points - 1) / 3), and it starts from the first two principal components.

    Args:
        activations: of at least ``FEWEST`` demonstrations.
        layers: the first, the middle and the last collected one if None.
        seed: of the random part in computing these two, on which little depends.

    Raises:
        SiteError, DemonstrationError: a layer was not collected, or there are fewer demonstrations than ``FEWEST``.

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
        mark
        for layer in _chosen(first_middle_last(collected) if layers is None else layers, collected)
        for mark in _plane(layer, {"positive": positive[layer], "negative": negative[layer]}, "tsne", seed)
    ]


def effect_points(
    before: Activations,
    after: Activations,
    layers: Sequence[int] | None = None,
    *,
    method: Method = "pca",
    seed: int = 0,
) -> list[Mark]:
    """Return positives, negatives, neutrals and edited neutrals of each layer, laid in a plane that all share.

    PCA is the default since it is the more honest: fitted on the four groups alike, it is one linear map, so lengths
    and directions in the plane are projections of the true ones, and the panel says what share of the variance it
    shows. By t-SNE a mild edit can look like a leap or like none; it tells only which activations are neighbours.

    Args:
        before: of the model as it is.
        after: of the same demonstrations while the edit is applied; of it, the neutrals are drawn.
        layers: the last one in both if None.
        method: ``pca`` or ``tsne``.
        seed: of t-SNE.

    Raises:
        SiteError, ActivationError: a layer was not collected, or the neutrals differ in shape.
        SettingError, DemonstrationError: as ``check_method``.

    Example:
        >>> import torch
        >>> h = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        >>> before = Activations("mlp", {0: h}, {0: h + 1}, {0: h - 1})
        >>> after = Activations("mlp", {0: h + 0.5}, {0: h}, {0: h})
        >>> [mark.series for mark in effect_points(before, after)][::4]
        ['positive', 'negative', 'neutral', 'edited neutral']
    """
    collected = sorted(set(before.neutral) & set(after.neutral))
    marks: list[Mark] = []
    for layer in _chosen(collected[-1:] if layers is None else layers, collected):
        neutral, edited = before.neutral[layer], after.neutral[layer]
        if neutral.shape != edited.shape:
            shapes = f"{tuple(neutral.shape)} before and {tuple(edited.shape)} after the edit"
            raise ActivationError(f"layer {layer}: neutrals are {shapes}; collect both from the same demonstrations")
        groups = {"positive": before.positive[layer], "negative": before.negative[layer], "neutral": neutral}
        marks += _plane(layer, groups | {"edited neutral": edited}, method, seed)
    return marks


def _chosen(layers: Sequence[int], collected: Sequence[int]) -> list[int]:
    missing = [layer for layer in layers if layer not in collected]
    if missing or not layers:
        told = f"layers {missing} were not collected" if missing else "no layer is named"
        raise SiteError(f"{told}; collect them, or name one or more of {list(collected)}")
    return list(layers)


def _plane(layer: int, groups: Mapping[str, Tensor], method: Method, seed: int) -> list[Mark]:
    check_method(method, min(block.shape[0] for block in groups.values()))
    matrix = torch.cat(list(groups.values())).double().cpu().numpy()
    panel = f"layer {layer}"
    if method == "tsne":
        places = _tsne(matrix, seed)
    else:
        from sklearn.decomposition import PCA

        pca = PCA(2, svd_solver="full").fit(matrix)
        places = pca.transform(matrix)
        panel += f": {pca.explained_variance_ratio_.sum():.0%} of variance"
    series = [name for name, block in groups.items() for _ in range(block.shape[0])]
    return [Mark(panel, name, float(x), float(y)) for name, (x, y) in zip(series, places, strict=True)]


def _tsne(matrix: Any, seed: int) -> Any:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(30.0, (matrix.shape[0] - 1) / 3)
    # Several threads add up in any order, and t-SNE turns the last bit of a sum into another picture.
    with threadpool_limits(1):
        return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(matrix)


def activation_spectra(activations: Activations, *, centered: bool = False) -> Spectra:
    """Return the singular values of Omega+ and Omega- of each collected layer, those above rounding.

    Omega+ = H^T H+ / n and Omega- = H^T H- / n (Qiu et al. 2024, arXiv 2405.09719, section 3); at most min(n, d) each.

    Args:
        activations: of n demonstrations.
        centered: subtract each matrix's own mean.

    Raises:
        DegenerateError: a cross-covariance is zero.

    Example:
        >>> import torch
        >>> h = {0: torch.eye(2)}
        >>> activation_spectra(Activations("mlp", h, {0: torch.diag(torch.tensor([4.0, 3.0]))}, h))[0][0]
        tensor([2.0000, 1.5000], dtype=torch.float64)
    """

    def values(x: Tensor, y: Tensor) -> Tensor:
        covariance = CrossCovariance(x.shape[1], centered=centered)
        covariance.update(x, y)
        found = leading_spectrum(covariance.compute(), explained_variance=1)
        return found.values[: found.rank]

    return {
        layer: (values(neutral, activations.positive[layer]), values(neutral, activations.negative[layer]))
        for layer, neutral in activations.neutral.items()
    }


def projection_spectra(projections: Mapping[int, Projection]) -> Spectra:
    """Return the singular values that ``edit.projections`` hold, those above rounding, the kept ones at least.

    Example:
        >>> import torch
        >>> e = torch.eye(3)
        >>> values = torch.tensor([2.0, 1e-20])
        >>> projection_spectra({4: Projection(e[:, :1], e[:, 1:2], None, "identity", values, values, 4.0, 4.0)})
        {4: (tensor([2.], dtype=torch.float64), tensor([2.], dtype=torch.float64))}
    """

    def known(values: Tensor, width: int) -> Tensor:
        values = values.double().cpu()
        return values[values > values[0] * width * torch.finfo(torch.float64).eps]

    return {
        layer: (known(p.singular_values_positive, p.width), known(p.singular_values_negative, p.width))
        for layer, p in projections.items()
    }


def spectrum_points(spectra: Spectra) -> list[Mark]:
    """Return the singular values of each layer against their index, from 1.

    Args:
        spectra: of ``activation_spectra`` or ``projection_spectra``.

    Example:
        >>> import torch
        >>> spectrum_points({2: (torch.tensor([4.0, 1.0]), torch.tensor([3.0]))})[1]
        Mark(panel='positives', series='layer 2', x=2.0, y=1.0, low=None, high=None)
    """
    return [
        Mark(panel, f"layer {layer}", float(index), float(value))
        for side, panel in enumerate(("positives", "negatives"))
        for layer in sorted(spectra)
        for index, value in enumerate(spectra[layer][side].tolist(), start=1)
    ]


def signature_points(
    signatures: Mapping[str, Mapping[int, float]], *, depths: Mapping[str, int] | None = None
) -> list[Mark]:
    """Return the signatures of several models or behaviours against relative depth, (layer + 1) / depth, in (0, 1].

    Args:
        signatures: by name, layer -> signature, as of ``sealign.fitting.activations.layer_signatures``.
        depths: by name, the number of the model's layers; the last layer named is the model's last where not given.

    Raises:
        SettingError: a name has no layers, or one beyond its depth.

    Example:
        >>> [mark.x for mark in signature_points({"fairness": {0: 0.5, 1: 0.8, 3: 2.0}})]
        [0.25, 0.5, 1.0]
    """
    marks = []
    for name, by_layer in signatures.items():
        last = max(by_layer, default=-1)
        depth = (depths or {}).get(name, last + 1)
        if not 0 <= last < depth:
            raise SettingError(
                f"the last layer of '{name}' is {last}, but must be in [0, {depth - 1}]; check its depth"
            )
        marks += [Mark("", name, (layer + 1) / depth, by_layer[layer]) for layer in sorted(by_layer)]
    return marks


def score_points(counts: Sequence[int], scores: Sequence[Sequence[float]], *, base: float) -> list[Mark]:
    """Return the mean score at each number of demonstrations, with a band from the lowest to the highest run.

    The band is the range, not a confidence interval: of the three to five runs that are usual, it says what was seen.

    Args:
        counts: numbers of demonstrations, at least 2, all different.
        scores: at each, the scores of its runs, which differ in seed; at least 1, not everywhere as many.
        base: score of the unedited model.

    Raises:
        SettingError: counts and scores do not fit each other.

    Example:
        >>> score_points([25, 50], [[0.25, 0.75], [0.5]], base=0.25)[0]
        Mark(panel='', series='edited: mean, and range of 1 to 2 runs', x=25.0, y=0.5, low=0.25, high=0.75)
    """
    sizes = sorted({len(row) for row in scores})
    if len(counts) != len(scores) or len(set(counts)) < max(2, len(counts)) or min(*counts, *sizes) < 1:
        raise SettingError(
            f"there are {[len(row) for row in scores]} runs at {list(counts)} demonstrations, but a curve needs at "
            "least 1 run at each of at least 2 different numbers above 0; leave out the others"
        )
    told = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"
    marks = [
        Mark("", f"edited: mean, and range of {told} runs", float(count), sum(row) / len(row), min(row), max(row))
        for count, row in sorted(zip(counts, scores, strict=True))
    ]
    return marks + [Mark("", "base model", marks[end].x, base) for end in (0, -1)]
