"""Projection: the edit of one layer by SEA, stored as two thin factors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.errors import ActivationError, NormalizationError, check_choice
from sealign.spectral.feature_maps import get_feature_map

Combine = Literal["both", "positive", "negative", "average", "reversed"]
"""How the projected parts form y: ``both`` is P+ x + P- x, ``positive`` P+ x, ``negative`` P- x, ``average``
(P+ x + P- x) / 2, and ``reversed`` is ``both`` with U+ and U- exchanged."""

Normalization = Literal["token", "feature", "none"]
"""How y is rescaled: to the norm of each token of x, to the norm of each feature over the tokens, or not at all."""

COMBINES: tuple[Combine, ...] = get_args(Combine)
NORMALIZATIONS: tuple[Normalization, ...] = get_args(Normalization)


@dataclass(frozen=True, eq=False)
class Projection:
    """The edit of one layer by SEA: two thin factors, called on a tensor of activations.

    P+ = U+ U+^T keeps what covaries with the positives, P- = I - U- U-^T drops what covaries with the
    negatives (Qiu et al. 2024, arXiv 2405.09719, section 3). Only U+ and U- are stored: a token costs
    4 d (k+ + k-) floating-point operations, and no (d, d) matrix is ever formed.

    Attributes:
        positive: U+, (d, k+), with orthonormal columns.
        negative: U-, (d, k-), with orthonormal columns.
        mean: mu, (d,), the mean of Phi(H), about which a centred edit acts; None if uncentred.
        feature_map: Name of Phi.

    Example:
        >>> import torch
        >>> e = torch.eye(3)
        >>> projection = Projection(e[:, :1], e[:, 1:2])
        >>> projection(torch.tensor([[1.0, 2.0, 3.0]]), normalization="none")
        tensor([[2., 0., 3.]])
    """

    positive: Float[Tensor, "d kp"]
    negative: Float[Tensor, "d kn"]
    mean: Float[Tensor, " d"] | None = None
    feature_map: str = "identity"

    @property
    def width(self) -> int:
        """Number of features d."""
        return self.positive.shape[0]

    @property
    def rank_positive(self) -> int:
        """Number of directions kept, k+."""
        return self.positive.shape[1]

    @property
    def rank_negative(self) -> int:
        """Number of directions dropped, k-."""
        return self.negative.shape[1]

    def __call__(
        self,
        tokens: Float[Tensor, "*batch d"],
        *,
        combine: Combine = "both",
        normalization: Normalization = "token",
        strength: float | Tensor = 1.0,
    ) -> Float[Tensor, "*batch d"]:
        """Return the edited activations x' = x + strength (y - x).

        y = P+ x + P- x, or another combination; with a feature map, y = Phi^-1(P+ Phi(x)) + Phi^-1(P- Phi(x)). If
        centred, both projections act on x - mu, and mu is added once. y is then rescaled to the norm of x.
        A centred edit with a feature map acts about mu in feature space: its parts are Phi^-1(mu + P (Phi(x) - mu)),
        and Phi^-1(mu) is subtracted where two parts are added. For the identity map this is the linear formula. The
        paper does not define this case.

        Args:
            tokens: Activations, (..., d). float32 and wider types are computed in the same type, narrower types in
                float32; the result has the type of ``tokens``.
            combine: How the projected parts form y.
            normalization: ``token`` multiplies y by |x| / |y| per token, ``feature`` per feature over the
                last-but-one axis, ``none`` leaves it.
            strength: Share of the change to apply; any finite number, or a tensor of no dimensions. The number 0
                returns ``tokens`` itself.

        Raises:
            SettingError: The combination or normalization is unknown.
            ActivationError: The last axis does not have length ``width``.
            NormalizationError: ``feature`` is used on a single vector.
        """
        check_choice("combination", combine, COMBINES)
        check_choice("normalization", normalization, NORMALIZATIONS)
        if tokens.shape[-1] != self.width:
            raise ActivationError(
                f"the tokens have {tokens.shape[-1]} features, but the projection has {self.width}; "
                "use activations of the site that it was fitted on"
            )
        if normalization == "feature" and tokens.dim() < 2:
            raise NormalizationError(
                "normalization 'feature' needs a (tokens, d) tensor, got a single vector; use normalization='token'"
            )
        if not isinstance(strength, Tensor) and strength == 0:
            return tokens
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        x = tokens.to(dtype)
        y = self._combine(x, combine)
        if normalization != "none":
            y = y * norm_ratio(x, y, -1 if normalization == "token" else -2)
        weight = strength.to(dtype) if isinstance(strength, Tensor) else strength
        return torch.lerp(x, y, weight).to(tokens.dtype)

    def _combine(self, x: Tensor, combine: Combine) -> Tensor:
        """Return y before the rescaling."""
        positive, negative = (factor.to(x.device, x.dtype) for factor in (self.positive, self.negative))
        if combine == "reversed":
            positive, negative = negative, positive
        phi = get_feature_map(self.feature_map)
        origin = torch.zeros_like(x[..., :1]) if self.mean is None else self.mean.to(x.device, x.dtype)
        features = phi.forward(x) - origin

        def kept() -> Tensor:
            return phi.inverse(origin + (features @ positive) @ positive.T, x)

        def dropped() -> Tensor:
            return phi.inverse(origin + features - (features @ negative) @ negative.T, x)

        if combine == "positive":
            return kept()
        if combine == "negative":
            return dropped()
        if combine == "average":
            return (kept() + dropped()) / 2
        total = kept() + dropped()
        return total if self.mean is None else total - phi.inverse(origin.expand_as(x), x)

    def reversed(self) -> Projection:
        """Return the projection with the roles of positive and negative exchanged.

        Example:
            >>> import torch
            >>> e = torch.eye(3)
            >>> Projection(e[:, :1], e[:, 1:]).reversed().rank_positive
            2
        """
        return dataclasses.replace(self, positive=self.negative, negative=self.positive)


def norm_ratio(x: Tensor, y: Tensor, axis: int) -> Tensor:
    """Return |x| / |y| along an axis, and 1 where y is zero."""
    norm = torch.linalg.vector_norm(y, dim=axis, keepdim=True)
    # Division by zero would make the gradient NaN, though its result is not used.
    ratio = torch.linalg.vector_norm(x, dim=axis, keepdim=True) / torch.where(norm > 0, norm, 1.0)
    return torch.where(norm > 0, ratio, 1.0)
