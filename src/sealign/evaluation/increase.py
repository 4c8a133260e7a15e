"""Increase of a loss over texts: its mean, and intervals that account for the sampling of the texts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import special


def increase_with_bound(
    tokens: NDArray[np.float64], base: NDArray[np.float64], edited: NDArray[np.float64]
) -> tuple[float, float]:
    """Return the mean increase of the loss over all tokens, and the upper end of its one-sided 95 % interval.

    Let d_i be the increase on text i, and w_i its number of tokens divided by the number of all tokens. The mean is
    m = sum w_i d_i, its standard error SE = sqrt(n / (n - 1) sum w_i^2 (d_i - m)^2), the bound m + t_{n-1}(0.95) SE.
    The bound accounts for sampling of the texts.

    Args:
        tokens: Number of predicted tokens of each text, (n,), n at least 2.
        base: Mean loss of the base model on each text, (n,).
        edited: Mean loss of the edited model on each text, (n,).

    Example:
        >>> increase_with_bound(np.ones(2), np.zeros(2), np.array([0.5, 0.5]))
        (0.5, 0.5)
    """
    mean, error = _mean_with_error(tokens, edited - base)
    return mean, float(mean + special.stdtrit(len(base) - 1, 0.95) * error)


def increase_interval(
    tokens: NDArray[np.float64], base: NDArray[np.float64], edited: NDArray[np.float64]
) -> tuple[float, float]:
    """Return the ends of the two-sided 95 % interval of the mean increase of the loss, m -+ t_{n-1}(0.975) SE.

    Args:
        tokens, base, edited: As for ``increase_with_bound``.

    Example:
        >>> increase_interval(np.ones(2), np.zeros(2), np.array([0.5, 0.5]))
        (0.5, 0.5)
    """
    mean, error = _mean_with_error(tokens, edited - base)
    reach = float(special.stdtrit(len(base) - 1, 0.975)) * error
    return mean - reach, mean + reach


def _mean_with_error(tokens: NDArray[np.float64], increases: NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean over all tokens and its standard error over texts."""
    weights, count = tokens / tokens.sum(), len(increases)
    mean = float(weights @ increases)
    return mean, float(np.sqrt(count / (count - 1) * float(np.square(weights) @ np.square(increases - mean))))
