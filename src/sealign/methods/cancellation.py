"""Cancellation: how far what SEA keeps and what it drops are the same, and do nothing together."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sealign.edits.record import EditRecord
from sealign.spectral.feature_maps import get_feature_map
from sealign.spectral.projection import Projection

NEARLY_CANCELS = 0.05
"""Net share below which what an edit keeps and what it drops nearly cancel."""


def cancellation(projection: Projection, neutral: Float[Tensor, "n d"]) -> dict[str, float]:
    """Return how far what a projection keeps and what it drops cancel, since P+ + P- = I + U+ U+^T - U- U-^T.

    ``overlap`` is |U+^T U-|_F^2 / min(k+, k-), the mean squared cosine of the angles between the two subspaces: 1 if
    one contains the other. ``net_share`` is sum |a - b| / sum (|a| + |b|) over the neutral activations, with
    a = U+ U+^T z, b = U- U-^T z and z = Phi(x) - mu: 1 if nothing cancels, 0 if all does.

    Args:
        projection: U+ and U-.
        neutral: Neutral activations, (n, d).
    """
    kept, dropped = projection.positive.double(), projection.negative.double()
    overlap = float((kept.T @ dropped).square().sum()) / min(kept.shape[1], dropped.shape[1])
    z = get_feature_map(projection.feature_map).forward(neutral.double())
    z = z if projection.mean is None else z - projection.mean
    a, b = z @ kept @ kept.T, z @ dropped @ dropped.T
    lengths = [float(rows.norm(dim=1).sum()) for rows in (a - b, a, b)]
    return {"overlap": overlap, "net_share": lengths[0] / (lengths[1] + lengths[2])}


def cancellation_warning(record: EditRecord) -> str:
    """Return a sentence if what an edit keeps nearly cancels what it drops at some layers, else an empty string.

    Args:
        record: Record of an edit; one of another method than SEA has no net share, and one with a shift acts by that.
    """
    if record.config.get("shift"):
        return ""
    figures = {layer: entry.statistics.get("net_share", 1.0) for layer, entry in record.layers.items()}
    low = [layer for layer, share in figures.items() if share < NEARLY_CANCELS]
    if not low:
        return ""
    least = min(low, key=lambda layer: figures[layer])
    return (
        f"What the edit keeps and what it drops nearly cancel at {len(low)} of {len(figures)} layers: the net share is "
        f"{figures[least]:.3f} at layer {least}, below {NEARLY_CANCELS:g}; fit it centered with an explained variance "
        "of at least 0.9, add the difference of the means with shift, or use another method, such as mean_difference."
    )
