"""Signature of a layer: how strongly its activations covary with the label positive / negative."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def layer_signature(positive: Float[Tensor, "n d"], negative: Float[Tensor, "n d"], *, centered: bool = False) -> float:
    """Return the signature of a layer: how strongly its activations covary with the label.

    The signature is the sum of the singular values of X^T Y / (2n), with X the (2n, d) stacked activations and Y the
    (2n, 2) one-hot labels (Qiu et al. 2024, arXiv 2405.09719, section on signatures). With ``centered``, the
    matrix is (X - mean X)^T (Y - mean Y) / (2n), and the signature equals |mean(H+) - mean(H-)| / sqrt(8).

    Args:
        positive: Activations H+ of the positive completions, (n, d).
        negative: Activations H- of the negative completions, (n, d).
        centered: Whether to subtract the means of activations and labels.

    Example:
        >>> import torch
        >>> layer_signature(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        2.0
    """
    return signature_of_means(positive.double().mean(0), negative.double().mean(0), centered=centered)


def signature_of_means(
    positive: Float[Tensor, " d"], negative: Float[Tensor, " d"], *, centered: bool = False
) -> float:
    """Return the signature of a layer from the means of its positive and negative activations.

    With as many positives as negatives, X^T Y / (2n) has the columns m+ / 2 and m- / 2; centred, they are
    (m+ - m-) / 4 and (m- - m+) / 4.

    Args:
        positive: Mean m+ of the activations of the positive completions, (d,).
        negative: Mean m- of the activations of the negative completions, (d,).
        centered: Whether to subtract the means of activations and labels.

    Example:
        >>> import torch
        >>> signature_of_means(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0]))
        2.0
    """
    columns = torch.stack([positive, negative], dim=1).double() / 2
    if centered:
        columns = columns - columns.mean(1, keepdim=True)
    return float(torch.linalg.svdvals(columns).sum())
