"""Phi: invertible elementwise maps for non-linear editing, and their inverses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.errors import SettingError, unknown_name

EPSILON = 1e-4
"""Distance kept from the ends of an inverse's domain."""


@dataclass(frozen=True)
class FeatureMap:
    """An elementwise map Phi with an inverse that also sees the unedited activation.

    Attributes:
        name: the name it is known by in settings and files.
        forward: Phi, ``(..., d) -> (..., d)``.
        inverse: Phi^-1, from the edited features and the unedited activation ``x``, both ``(..., d)``;
            ``x`` gives the sign where Phi is even.

    Example:
        >>> import torch
        >>> phi = get_feature_map("tanh")
        >>> x = torch.tensor([0.5, -1.0])
        >>> torch.allclose(phi.inverse(phi.forward(x), x), x, atol=1e-6)
        True
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor, Tensor], Tensor]


def _identity(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    return x


def _identity_inverse(y: Float[Tensor, "*batch d"], x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    return y


def _squared_exponential(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    return torch.exp(-x.square() / 2)


def _squared_exponential_inverse(
    y: Float[Tensor, "*batch d"], x: Float[Tensor, "*batch d"]
) -> Float[Tensor, "*batch d"]:
    return torch.sign(x) * torch.sqrt(-2 * torch.log(y.clamp(EPSILON, 1)))


def _tanh_inverse(y: Float[Tensor, "*batch d"], x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    return torch.atanh(y.clamp(EPSILON - 1, 1 - EPSILON))


def _elu(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    return torch.nn.functional.elu(x)


def _elu_inverse(y: Float[Tensor, "*batch d"], x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    return torch.where(y >= 0, y, torch.log1p(y.clamp(min=EPSILON - 1, max=0)))


FEATURE_MAPS = MappingProxyType(
    {
        "identity": FeatureMap("identity", _identity, _identity_inverse),
        "squared_exponential": FeatureMap("squared_exponential", _squared_exponential, _squared_exponential_inverse),
        "tanh": FeatureMap("tanh", torch.tanh, _tanh_inverse),
        "elu": FeatureMap("elu", _elu, _elu_inverse),
    }
)
"""The maps of Phi-SEA by name; ``identity`` is linear SEA.

| name | Phi(x) | Phi^-1(y), eps = 1e-4 |
| --- | --- | --- |
| ``squared_exponential`` | exp(-x^2 / 2) | sign(x) sqrt(-2 log clip(y, eps, 1)) |
| ``tanh`` | tanh(x) | atanh(clip(y, -1 + eps, 1 - eps)) |
| ``elu`` | x if x >= 0, else exp(x) - 1 | y if y >= 0, else log(1 + max(y, -1 + eps)) |

Source: Qiu et al. 2024 (arXiv 2405.09719), section on non-linear editing; length scale 1.
"""


def get_feature_map(name: str) -> FeatureMap:
    """Return the feature map called ``name``.

    Raises:
        SettingError: no map has this name; the nearest name is suggested.

    Example:
        >>> get_feature_map("elu").name
        'elu'
    """
    if name not in FEATURE_MAPS:
        raise SettingError(unknown_name("feature map", name, FEATURE_MAPS))
    return FEATURE_MAPS[name]
