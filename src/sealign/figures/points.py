"""The data of figures: lists of points for spectra, signatures and scores."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from sealign.errors import SettingError
from sealign.files import write_bytes
from sealign.fitting.activations import Activations
from sealign.spectral.cross_covariance import CrossCovariance
from sealign.spectral.decomposition import leading_spectrum
from sealign.spectral.signature import layer_signature

Spectra = Mapping[int, tuple[Float[Tensor, " p"], Float[Tensor, " q"]]]
"""By layer, the singular values of Omega+ and of Omega- in descending order; the two may differ in number."""


@dataclass(frozen=True)
class Point:
    """A point of a figure.

    Attributes:
        panel: Title of the panel; empty in a figure with one panel.
        series: Name of the series in the legend; activations of a series are in the order of the demonstrations.
        x, y: Coordinates, in the units of the axes.
        low, high: Ends of a band around y; None if there is no band.
    """

    panel: str
    series: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


def save_points(points: Sequence[Point], path_without_suffix: str | Path) -> Path:
    """Write points as CSV with a header, atomically; the columns low and high only if a point has them.

    Args:
        points: Points of a figure.
        path_without_suffix: Path of the file without ``.csv``; its folder is created.

    Raises:
        OSError: The folder cannot be created or written to.
    """
    names = [field.name for field in dataclasses.fields(Point)]
    used = [name for name in names if any(getattr(point, name) is not None for point in points)]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([used, *([getattr(point, name) for name in used] for point in points)])
    path = Path(f"{path_without_suffix}.csv")
    write_bytes(path, buffer.getvalue().encode())
    return path


def activation_spectra(activations: Activations, *, centered: bool = False) -> Spectra:
    """Return the singular values of Omega+ and Omega- of each collected layer, without those that are rounding errors.

    Omega+ = H^T H+ / n and Omega- = H^T H- / n (Qiu et al. 2024, arXiv 2405.09719, section 3) have at most min(n, d)
    such values each.

    Args:
        activations: Activations of n demonstrations.
        centered: Whether to subtract the mean of each matrix.

    Raises:
        DegenerateError: A cross-covariance is zero.

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


def spectrum_points(spectra: Spectra) -> list[Point]:
    """Return the singular values of each layer against their index, which starts at 1.

    Args:
        spectra: Singular values by layer, as returned by ``activation_spectra``.

    Example:
        >>> import torch
        >>> spectrum_points({2: (torch.tensor([4.0, 1.0]), torch.tensor([3.0]))})[1]
        Point(panel='positives', series='layer 2', x=2.0, y=1.0, low=None, high=None)
    """
    return [
        Point(panel, f"layer {layer}", float(index), float(value))
        for side, panel in enumerate(("positives", "negatives"))
        for layer in sorted(spectra)
        for index, value in enumerate(spectra[layer][side].tolist(), start=1)
    ]


def activation_signatures(activations: Activations, *, centered: bool = False) -> dict[int, float]:
    """Return the signature of each collected layer; see ``sealign.spectral.signature``.

    Args:
        activations: Activations of at least 1 demonstration.
        centered: Whether to subtract the means of activations and labels.

    Example:
        >>> import torch
        >>> h = {0: torch.tensor([[2.0, 0.0]])}
        >>> activation_signatures(Activations("mlp", h, h, {0: torch.tensor([[0.0, 2.0]])}))
        {0: 2.0}
    """
    return {
        layer: layer_signature(activations.positive[layer], activations.negative[layer], centered=centered)
        for layer in activations.layers
    }


def signature_points(
    signatures: Mapping[str, Mapping[int, float]], *, depths: Mapping[str, int] | None = None
) -> list[Point]:
    """Return the signatures of several models or behaviours against relative depth, (layer + 1) / depth, in (0, 1].

    Args:
        signatures: Mapping from name to the signature of each layer, as returned by ``activation_signatures``.
        depths: Mapping from name to the number of layers of the model. Default: the last layer in ``signatures`` is the
            last layer of the model.

    Raises:
        SettingError: A name has no layers, or a layer beyond the depth of its model.

    Example:
        >>> [point.x for point in signature_points({"fairness": {0: 0.5, 1: 0.8, 3: 2.0}})]
        [0.25, 0.5, 1.0]
    """
    points = []
    for name, by_layer in signatures.items():
        last = max(by_layer, default=-1)
        depth = (depths or {}).get(name, last + 1)
        if not 0 <= last < depth:
            raise SettingError(
                f"the last layer of '{name}' is {last}, but it must be in [0, {depth - 1}]; check its depth"
            )
        points += [Point("", name, (layer + 1) / depth, by_layer[layer]) for layer in sorted(by_layer)]
    return points


def score_points(counts: Sequence[int], scores: Sequence[Sequence[float]], *, base: float) -> list[Point]:
    """Return the mean score at each number of demonstrations, with a band from the lowest to the highest run.

    The band is the range of the runs, not a confidence interval: the usual three to five runs are too few for one.

    Args:
        counts: Numbers of demonstrations; at least 2 different numbers.
        scores: For each number, the scores of its runs, which differ in their seed; at least 1 run.
        base: Score of the base model.

    Raises:
        SettingError: There is a number without runs, fewer than 2 numbers, or one that occurs twice or is below 1.

    Example:
        >>> score_points([25, 50], [[0.25, 0.75], [0.5]], base=0.25)[0]
        Point(panel='', series='edited: mean and range of 1 to 2 runs', x=25.0, y=0.5, low=0.25, high=0.75)
    """
    sizes = sorted({len(row) for row in scores})
    if len(counts) != len(scores) or len(set(counts)) < max(2, len(counts)) or min(*counts, *sizes) < 1:
        raise SettingError(
            f"there are {[len(row) for row in scores]} runs at {list(counts)} demonstrations, but a curve needs at "
            "least 1 run at each of at least 2 different numbers above 0; leave out the other numbers"
        )
    runs = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"
    points = [
        Point("", f"edited: mean and range of {runs} runs", float(count), sum(row) / len(row), min(row), max(row))
        for count, row in sorted(zip(counts, scores, strict=True))
    ]
    return points + [Point("", "base model", points[end].x, base) for end in (0, -1)]
