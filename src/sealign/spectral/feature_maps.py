"""Feature maps Phi of Phi-SEA: invertible elementwise maps and their inverses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.errors import SettingError, unknown_name

FeatureMapName = Literal["identity", "squared_exponential", "tanh", "elu"]
"""Name of a feature map; ``identity`` is linear SEA."""

EPSILON = 1e-4
"""Distance from the ends of the domain of an inverse to which its argument is clipped."""


@dataclass(frozen=True)
class FeatureMap:
    """An elementwise map Phi and its inverse.

    Attributes:
        name: Name of the map in settings and files.
        forward: Phi, ``(..., d) -> (..., d)``.
        inverse: Phi^-1 as a function of the edited features and the unedited activation x, both ``(..., d)``. An even
            Phi takes the sign of the result from x.

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


def _identity_inverse(y: Float[Tensor, "*batch d"], _x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    return y


def _squared_exponential(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    return torch.exp(-x.square() / 2)


def _squared_exponential_inverse(
    y: Float[Tensor, "*batch d"], x: Float[Tensor, "*batch d"]
) -> Float[Tensor, "*batch d"]:
    return torch.sign(x) * torch.sqrt(-2 * torch.log(y.clamp(EPSILON, 1)))


def _tanh_inverse(y: Float[Tensor, "*batch d"], _x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    return torch.atanh(y.clamp(EPSILON - 1, 1 - EPSILON))


def _elu(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    return torch.nn.functional.elu(x)


def _elu_inverse(y: Float[Tensor, "*batch d"], _x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    return torch.where(y >= 0, y, torch.log1p(y.clamp(min=EPSILON - 1, max=0)))


FEATURE_MAPS = MappingProxyType(
    {
        "identity": FeatureMap("identity", _identity, _identity_inverse),
        "squared_exponential": FeatureMap("squared_exponential", _squared_exponential, _squared_exponential_inverse),
        "tanh": FeatureMap("tanh", torch.tanh, _tanh_inverse),
        "elu": FeatureMap("elu", _elu, _elu_inverse),
    }
)
"""Feature maps by name; ``identity`` gives linear SEA.

| name | Phi(x) | Phi^-1(y), eps = 1e-4 |
| --- | --- | --- |
| ``squared_exponential`` | exp(-x^2 / 2) | sign(x) sqrt(-2 log clip(y, eps, 1)) |
| ``tanh`` | tanh(x) | atanh(clip(y, -1 + eps, 1 - eps)) |
| ``elu`` | x if x >= 0, else exp(x) - 1 | y if y >= 0, else log(1 + max(y, -1 + eps)) |

Source: Qiu et al. 2024 (arXiv 2405.09719), section on non-linear editing; length scale 1.
"""


def get_feature_map(name: str) -> FeatureMap:
    """Return the feature map of a name.

    Args:
        name: ``identity``, ``squared_exponential``, ``tanh`` or ``elu``.

    Raises:
        SettingError: No map has this name; the message suggests the nearest one.

    Example:
        >>> get_feature_map("elu").name
        'elu'
    """
    if name not in FEATURE_MAPS:
        raise SettingError(unknown_name("feature map", name, FEATURE_MAPS))
    return FEATURE_MAPS[name]
