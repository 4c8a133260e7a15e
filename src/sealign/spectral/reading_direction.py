"""The direction in which activations of demonstrations differ most from those of ordinary text."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.errors import DegenerateError

RIDGE = 0.1
"""Ridge of the regression, in units of the mean squared activation of a feature over the completions."""


def reading_direction(sides: Float[Tensor, "m d"], ordinary: Float[Tensor, "t d"]) -> Float[Tensor, " d"]:
    """Return the direction r whose response r . x is 1 on average on demonstrations and near 0 on ordinary text.

    With C and X the matrices of second moments of the rows h and x, and c the mean of the rows h, r is proportional to

        argmin mean (r . h - 1)^2 + mean (r . x)^2 + e |r|^2 = (C + X + e I)^-1 c,      e = RIDGE trace(C) / d.

    Args:
        sides: Activations h of the completions, positive and negative, (m, d); at least 1 row.
        ordinary: Activations x of the tokens of ordinary text, (t, d); at least 1 row.

    Returns:
        r in float64, (d,).

    Raises:
        DegenerateError: The mean of the completions' activations is zero.

    Example:
        >>> h, x = torch.tensor([[2.0, 2.0]]), torch.tensor([[0.0, 90.0]])
        >>> reading_direction(h, x).round(decimals=3)
        tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    rows = torch.cat([sides.double() / len(sides) ** 0.5, ordinary.double() / len(ordinary) ** 0.5])
    wanted = torch.zeros(len(rows), dtype=torch.float64)
    wanted[: len(sides)] = len(sides) ** -0.5
    ridge = RIDGE * float(sides.double().square().mean())
    center = sides.double().mean(0)
    if not bool(center.any()):
        raise DegenerateError("the mean activation of the completions is zero; use another site or token choice")
    # (A^T A + e I)^-1 A^T b = A^T (A A^T + e I)^-1 b; the smaller one of both systems is solved.
    count, width = rows.shape
    eye = torch.eye(min(count, width), dtype=torch.float64)
    if count < width:
        read: Tensor = rows.T @ torch.linalg.solve(rows @ rows.T + ridge * eye, wanted)
    else:
        read = torch.linalg.solve(rows.T @ rows + ridge * eye, rows.T @ wanted)
    return read / (read @ center)
