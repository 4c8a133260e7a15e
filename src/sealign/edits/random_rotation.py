"""A random rotation of a subspace, from which the random control of an edit is made."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def random_rotation(span: Float[Tensor, "d m"], seed: int) -> Callable[[Tensor], Tensor]:
    """Return a function that maps columns inside the span of a matrix by one random orthogonal matrix.

    With B an orthonormal basis that contains the span and B' one of a random subspace of the same dimension, it is
    C -> B' B^T C, which keeps all lengths and angles of columns in the span. B' is uniformly distributed over all
    such bases (Mezzadri 2007, arXiv math-ph/0609050, section 5). Memory is proportional to the size of ``span``.

    Args:
        span: Columns that will be rotated, or others with the same span.
        seed: Seed of the rotation, any whole number. The result does not depend on the device.

    Returns:
        A function of a (d, k) matrix. It computes in float64 on the CPU and returns the matrix's own type and device.

    Example:
        >>> rotate = random_rotation(torch.eye(4)[:, :2], seed=0)
        >>> columns = rotate(torch.eye(4)[:, :2])
        >>> torch.allclose(columns.T @ columns, torch.eye(2), atol=1e-6)
        True
    """
    basis = torch.linalg.qr(span.double().cpu())[0]
    # Of a seed, torch's generator uses 32 bits, NumPy's all.
    generator = np.random.default_rng(2 * seed if seed >= 0 else -2 * seed - 1)
    target, triangle = torch.linalg.qr(torch.from_numpy(generator.standard_normal(basis.shape)))
    # A QR algorithm chooses the signs of the diagonal; without this they would decide the signs of the directions.
    target *= triangle.diagonal().sign()

    def rotate(columns: Tensor) -> Tensor:
        rotated: Tensor = target @ (basis.T @ columns.double().cpu())
        return rotated.to(columns.device, columns.dtype).contiguous()

    return rotate
