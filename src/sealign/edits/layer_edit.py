"""The edit of one layer: a low-rank affine function of a token's activation, or a projection in a feature space."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.edits.operator import edit_tokens
from sealign.errors import ActivationError, NormalizationError
from sealign.spectral.projection import Combine, Normalization, Projection, norm_ratio

EditFunction = Callable[[Tensor, float], Tensor]
"""A function of tokens and strength that returns the edited tokens."""


@dataclass(frozen=True, eq=False)
class LayerEdit(ABC):
    """The edit of one layer: x' = x + s (q y - x) for each token x, with y given by the subclass.

    Attributes:
        normalization: ``token``: q = |x| / |y| for each token; ``feature``: q is computed for each feature over all
            tokens of a sequence; ``none``: q = 1.
    """

    normalization: Normalization = field(default="none", kw_only=True)
    _prepared: dict[Any, EditFunction] = field(default_factory=dict, init=False, repr=False)

    @property
    @abstractmethod
    def width(self) -> int:
        """Number of features d of the activations."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """Number of directions that the edit holds."""

    @property
    @abstractmethod
    def feature_map(self) -> str:
        """Name of the feature map; ``identity`` for an affine edit."""

    @property
    def is_causal(self) -> bool:
        """Whether the edit of a token depends on that token alone."""
        return self.normalization != "feature"

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are saved, by name."""

    @abstractmethod
    def randomized(self, seed: int) -> LayerEdit:
        """Return the same edit with its directions rotated at random, as a control.

        A random rotation Q moves the subspace of the edit and keeps everything inside it: singular values, ranks,
        and the angles between the directions. A point about which the edit acts stays.

        Args:
            seed: Seed of the rotation.
        """

    @abstractmethod
    def reversed(self) -> LayerEdit:
        """Return the edit in the opposite direction, as a control."""

    @abstractmethod
    def _make(self, device: torch.device, dtype: torch.dtype) -> EditFunction:
        """Return the edit as a function, with its factors on a device in a type."""

    def prepare(self, device: torch.device, dtype: torch.dtype) -> EditFunction:
        """Return the edit with its factors on a device, for tokens of a type; built once for each pair.

        Args:
            device: Device of the tokens.
            dtype: Type of the tokens. The factors are kept in float32 or wider.
        """
        wide = torch.promote_types(dtype, torch.float32)
        if (device, wide) not in self._prepared:
            self._prepared[device, wide] = self._make(device, wide)
        # Stored under the token type too, so that a call finds it directly; types such as autocast's share factors.
        self._prepared[device, dtype] = self._prepared[device, wide]
        return self._prepared[device, wide]

    def __call__(self, tokens: Float[Tensor, "*batch d"], strength: float = 1.0) -> Float[Tensor, "*batch d"]:
        """Return the edited tokens.

        Args:
            tokens: Activations of any shape whose last axis has length ``width``, on any device.
            strength: s, any finite number; 0 returns ``tokens`` itself.

        Raises:
            ActivationError: The last axis does not have length ``width``.
            NormalizationError: A single vector is given to an edit that is rescaled per feature.
        """
        if tokens.shape[-1] != self.width:
            raise ActivationError(
                f"tokens have {tokens.shape[-1]} features, but the edit has {self.width}; use the model and the site "
                "that it was fitted on"
            )
        if strength == 0:
            return tokens
        edit = self._prepared.get((tokens.device, tokens.dtype)) or self.prepare(tokens.device, tokens.dtype)
        return edit(tokens, strength)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the prepared functions, which cannot be pickled and are built again when needed."""
        return {**vars(self), "_prepared": {}}

    def relative_change(self, tokens: Float[Tensor, "n d"], strength: float = 1.0) -> float:
        """Return the mean over tokens of |x' - x| / |x|; 0 means no change. Tokens that are zero are left out.

        Args:
            tokens: Activations, (n, d).
            strength: s.
        """
        lengths = tokens.norm(dim=-1)
        ratios = (self(tokens, strength) - tokens).norm(dim=-1)[lengths > 0] / lengths[lengths > 0]
        return float(ratios.mean()) if len(ratios) else 0.0


@dataclass(frozen=True, eq=False)
class AffineEdit(LayerEdit):
    """A low-rank affine edit: y = x + scale z + left (right z) + shift with z = x - center.

    Linear SEA, mean-difference steering, ITI and LEACE are all of this form.

    Attributes:
        left: (d, r).
        right: (r, d).
        scale: Multiple of z that is added; 0 for an edit of rank r.
        shift: Constant part, (d,), or None.
        center: Point about which the linear part acts, (d,), or None for the origin.

    Example:
        >>> import torch
        >>> e = torch.eye(3)
        >>> edit = AffineEdit(e[:, :1], e[:1], shift=torch.tensor([0.0, 0.0, 1.0]))
        >>> edit(torch.tensor([[1.0, 2.0, 3.0]]), 0.5)
        tensor([[1.5000, 2.0000, 3.5000]])
    """

    left: Float[Tensor, "d r"]
    right: Float[Tensor, "r d"]
    scale: float = 0.0
    shift: Float[Tensor, " d"] | None = None
    center: Float[Tensor, " d"] | None = None

    @classmethod
    def constant(cls, shift: Float[Tensor, " d"], *, normalization: Normalization = "none") -> AffineEdit:
        """Return the edit that adds a vector to every token.

        Args:
            shift: The vector, (d,).
            normalization: As for ``LayerEdit``.
        """
        none = shift.new_zeros(shift.shape[0], 0)
        return cls(none, none.T.contiguous(), shift=shift, normalization=normalization)

    @property
    def width(self) -> int:
        """Number of features d."""
        return self.left.shape[0]

    @property
    def rank(self) -> int:
        """Number of columns r of ``left``; 0 for a pure shift."""
        return self.left.shape[1]

    @property
    def feature_map(self) -> str:
        """Always ``identity``."""
        return "identity"

    def tensors(self) -> dict[str, Tensor]:
        """Return ``left`` and ``right``, and ``shift`` and ``center`` where there are any."""
        named = {"left": self.left, "right": self.right, "shift": self.shift, "center": self.center}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def linear_part(self, columns: Float[Tensor, "d m"]) -> Float[Tensor, "d m"]:
        """Return scale C + left (right C) for a matrix C of columns, in its own type."""
        left, right = (factor.to(columns.device, columns.dtype) for factor in (self.left, self.right))
        return self.scale * columns + left @ (right @ columns)

    def constant_part(self) -> Float[Tensor, " d"] | None:
        """Return shift - scale center - left (right center) in float64 on the CPU, or None if it is zero throughout.

        With it, y = x + scale x + left (right x) + constant part.
        """
        if self.shift is None and self.center is None:
            return None
        constant = torch.zeros(self.width, dtype=torch.float64)
        if self.shift is not None:
            constant = constant + self.shift.double().cpu()
        if self.center is not None:
            constant = constant - self.linear_part(self.center.double().cpu()[:, None])[:, 0]
        return constant if bool(constant.any()) else None

    def randomized(self, seed: int) -> AffineEdit:
        """Return left -> Q left, right -> right Q^T, shift -> Q shift, with Q a random rotation; the center stays."""
        columns = [self.left, self.right.T, *([] if self.shift is None else [self.shift[:, None]])]
        rotate = _random_rotation(torch.cat(columns, dim=1), seed)
        shift = None if self.shift is None else rotate(self.shift[:, None])[:, 0].contiguous()
        return dataclasses.replace(self, left=rotate(self.left), right=rotate(self.right.T).T.contiguous(), shift=shift)

    def reversed(self) -> AffineEdit:
        """Return the edit that adds the opposite change, y = x - (scale z + left (right z) + shift).

        For SEA's combination ``both`` this is the edit with positives and negatives exchanged.
        """
        shift = None if self.shift is None else -self.shift
        return dataclasses.replace(self, left=-self.left, scale=-self.scale, shift=shift)

    def _make(self, device: torch.device, dtype: torch.dtype) -> EditFunction:
        # Both are stored row by row: a product with a thin column-major matrix takes more than twice as long.
        inner = self.right.to(device, dtype).contiguous().T
        outer = self.left.T.to(device, dtype).contiguous()
        constant = self.constant_part()
        shift = None if constant is None else constant.to(device, dtype)
        scale, rescale = self.scale, self.normalization == "token"
        if self.normalization == "feature":
            return lambda tokens, strength: _edit_per_feature(tokens, inner, outer, shift, scale, strength)

        def edit(tokens: Tensor, strength: float) -> Tensor:
            # The operator is for graphs and gradients; without them it costs a dispatch more than the function.
            if torch.is_grad_enabled() or torch.compiler.is_compiling():
                found: Tensor = torch.ops.sealign.edit_tokens(tokens, inner, outer, shift, scale, strength, rescale)
                return found
            return edit_tokens(tokens, inner, outer, shift, scale, strength, rescale)

        return edit


@dataclass(frozen=True, eq=False)
class FeatureMapEdit(LayerEdit):
    """An edit in the feature space of an invertible elementwise map (Phi-SEA).

    y = Phi^-1(P+ Phi(x)) + Phi^-1(P- Phi(x)), or another combination; see ``Projection``.

    Attributes:
        projection: U+ and U- in feature space, with the name of Phi.
        combine: Which projected parts make y.
    """

    projection: Projection
    combine: Combine = "both"

    @property
    def width(self) -> int:
        """Number of features d."""
        return self.projection.width

    @property
    def rank(self) -> int:
        """Number of directions kept and dropped, k+ + k-."""
        return self.projection.rank_positive + self.projection.rank_negative

    @property
    def feature_map(self) -> str:
        """Name of Phi."""
        return self.projection.feature_map

    def tensors(self) -> dict[str, Tensor]:
        """Return ``positive`` and ``negative``, and ``mean`` if the edit is centred."""
        found = self.projection
        named = {"positive": found.positive, "negative": found.negative, "mean": found.mean}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def randomized(self, seed: int) -> FeatureMapEdit:
        """Return the edit with U+ and U- rotated together at random; the mean stays."""
        found = self.projection
        rotate = _random_rotation(torch.cat([found.positive, found.negative], dim=1), seed)
        rotated = dataclasses.replace(found, positive=rotate(found.positive), negative=rotate(found.negative))
        return dataclasses.replace(self, projection=rotated)

    def reversed(self) -> FeatureMapEdit:
        """Return the edit with the roles of positives and negatives exchanged."""
        return dataclasses.replace(self, projection=self.projection.reversed())

    def _make(self, device: torch.device, dtype: torch.dtype) -> EditFunction:
        projection = self.projection.to(device, dtype)

        def edit(tokens: Tensor, strength: float) -> Tensor:
            return projection(tokens, combine=self.combine, normalization=self.normalization, strength=strength)

        return edit


def _edit_per_feature(
    tokens: Tensor, inner: Tensor, outer: Tensor, shift: Tensor | None, scale: float, strength: float
) -> Tensor:
    if tokens.dim() < 2:
        raise NormalizationError("per-feature rescaling needs a (tokens, d) tensor; use normalization='token'")
    x = tokens.to(inner.dtype)
    y = edit_tokens(x, inner, outer, shift, scale, 1.0, False)
    return torch.lerp(x, y * norm_ratio(x, y, -2), strength).to(tokens.dtype)


def _random_rotation(span: Float[Tensor, "d m"], seed: int) -> Callable[[Float[Tensor, "d k"]], Float[Tensor, "d k"]]:
    """Return a function that applies a random rotation to columns inside the span of a matrix.

    With B and B' orthonormal bases of the span and of a random subspace of the same dimension, it is C -> B' B^T C; no
    (d, d) matrix is formed.
    """
    basis = torch.linalg.qr(span.double().cpu())[0]
    gaussian = torch.randn(basis.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    target = torch.linalg.qr(gaussian)[0]

    def rotate(columns: Tensor) -> Tensor:
        rotated: Tensor = target @ (basis.T @ columns.double().cpu())
        return rotated.to(columns.device, columns.dtype).contiguous()

    return rotate
