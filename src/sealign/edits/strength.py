"""Validation of the strength of an edit."""

from __future__ import annotations

import math

from sealign.errors import SettingError

MAX_STRENGTH = 1e30
"""Largest absolute value of a strength; its products with factors of an edit stay below the maximum of float32."""


def check_strength(strength: float | str) -> float:
    """Return a strength as a float, or raise an error if it is not a finite number.

    0 leaves the activation unchanged, 1 applies the fitted edit in full. Negative values, which edit in the opposite
    direction, and values above 1 are allowed.

    Args:
        strength: Number, or text to convert to a number.

    Raises:
        SettingError: The value is not a number, not finite, or too large for float32.

    Example:
        >>> check_strength("0.5")
        0.5
    """
    try:
        value = float(strength)
    except OverflowError:
        value = math.inf
    except (TypeError, ValueError):
        raise SettingError(f"strength is {strength!r}, but it must be a number; try 0.5") from None
    if not math.isfinite(value):
        raise SettingError(f"strength is {value}, but it must be finite; try a value in [0, 1]")
    if abs(value) > MAX_STRENGTH:
        raise SettingError(
            f"strength is {value:g}, but it must be in [-{MAX_STRENGTH:g}, {MAX_STRENGTH:g}], with which float32 can "
            "compute; try a value in [0, 1]"
        )
    return value
