"""The algorithm of Qiu et al. 2024 (arXiv 2405.09719) by its formulas, computed densely in float64.

The benchmarks compare with it: full cross-covariances, their full singular value decomposition, (d, d) projections, and
one demonstration at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def directions(neutral: Tensor, target: Tensor, explained_variance: float) -> Tensor:
    """Return U[:, :k] of Omega = H^T T / n, with the smallest k that explains the share."""
    covariance = neutral.double().T @ target.double() / neutral.shape[0]
    vectors, values, _ = torch.linalg.svd(covariance)
    shares = values.square().cumsum(0) / values.square().sum()
    k = int((shares >= explained_variance).int().argmax()) + 1
    return vectors[:, :k]


def fit(neutral: Tensor, positive: Tensor, negative: Tensor, explained_variance: float) -> tuple[Tensor, Tensor]:
    """Return P+ = U+ U+^T and P- = I - U- U-^T, (d, d) each."""
    plus = directions(neutral, positive, explained_variance)
    minus = directions(neutral, negative, explained_variance)
    return plus @ plus.T, torch.eye(neutral.shape[1], dtype=torch.float64) - minus @ minus.T


def edit(tokens: Tensor, keep: Tensor, drop: Tensor) -> Tensor:
    """Return x' = y |x| / |y| with y = P+ x + P- x."""
    y = tokens @ keep + tokens @ drop
    return y * (tokens.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True))


@torch.no_grad()
def collect(model: Any, demonstrations: Sequence[Sequence[Sequence[int]]], modules: Sequence[str]) -> list[Tensor]:
    """Return H, H+ and H-, (modules, n, d) each: the outputs of modules at the last token, one sequence at a time."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        return lambda _module, _inputs, output: found.__setitem__(path, output[0, -1].clone())

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in modules]
    try:
        roles: list[list[Tensor]] = [[], [], []]
        for sequences in demonstrations:
            for role, ids in enumerate(sequences):
                model(torch.tensor([ids]))
                roles[role].append(torch.stack([found[path] for path in modules]))
    finally:
        for handle in handles:
            handle.remove()
    return [torch.stack(rows, dim=1) for rows in roles]
