"""The likeliest tokens that a server lists at a position, and the divergence that they prove."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

ListedTokens = Mapping[int, tuple[float, str]]
"""Log-probability and text of the likeliest tokens of a position, and of the token that came, by token id."""


def divergence_bound(base: ListedTokens, edited: ListedTokens) -> float:
    """Return a lower bound of KL(base || edited), in nats, from the log-probabilities of the likeliest tokens.

    Tokens that both models list are kept, and all others are taken as one outcome, with probability 1 - sum p. Merging
    outcomes never raises a divergence (the data-processing inequality).

    Args:
        base, edited: Log-probabilities of the likeliest tokens of a position under each model.

    Example:
        >>> from math import log
        >>> round(divergence_bound({1: (log(0.5), "a")}, {1: (log(0.25), "a")}), 3)
        0.144
    """
    both = base.keys() & edited.keys()
    pairs = [(math.exp(base[token][0]), math.exp(edited[token][0])) for token in both]
    rest = [max(1 - sum(side), 0.0) for side in zip(*pairs, strict=True)] if pairs else [1.0, 1.0]
    if rest[1] > 0:  # what is left of one model, by rounding, where nothing is left of the other
        pairs.append((rest[0], rest[1]))
    return max(sum(p * math.log(p / q) for p, q in pairs if p > 0 and q > 0), 0.0)


def likeliest_tokens(position: ListedTokens, count: int = 5) -> list[dict[str, Any]]:
    """Return the names and log-probabilities of the likeliest tokens of a position, the likeliest first.

    Args:
        position: The tokens that the server lists.
        count: Number of tokens.
    """
    likeliest = sorted(position.values(), reverse=True)[:count]
    return [{"name": name, "log_probability": log} for log, name in likeliest]
