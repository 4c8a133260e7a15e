"""The strength of an edit: how far it moves an activation towards its edited value."""

from __future__ import annotations

import math

from sealign.errors import SettingError


def check_strength(strength: float | str) -> float:
    """Return a strength as a float, or raise an error if it is not a finite number.

    0 is no edit, 1 the whole edit. Negative values edit in the opposite direction, values above 1 go beyond the
    fitted edit; both are allowed.

    Args:
        strength: Number, or its text as typed by a user.

    Raises:
        SettingError: The value is not a number, or not finite.

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
    return value
