"""The low-rank affine edit of one layer, the form that every closed-form method but Phi-SEA gives."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.edits.layer_edit import EditFunction, LayerEdit, Strength, move_factor
from sealign.edits.operator import edit_tokens
from sealign.edits.random_rotation import random_rotation
from sealign.errors import NormalizationError, SettingError
from sealign.spectral.projection import Normalization, norm_ratio


@dataclass(frozen=True, eq=False)
class AffineEdit(LayerEdit):
    """Low-rank affine edit: y = x + scale z + left (right z) + shift with z = x - center.

    Linear SEA, mean-difference steering, ITI and LEACE are all of this form.

    Attributes:
        left: Left factor, shape (d, r).
        right: Right factor, shape (r, d).
        scale: Coefficient of z. If nonzero, the linear part has full rank.
        shift: Constant vector that is added, shape (d,), or None.
        center: Point that is subtracted before the linear part is applied, shape (d,), or None for the origin.
        groups: Numbers of consecutive columns of ``left`` that a random control rotates together, such as those that
            SEA keeps and those that it drops; their sum is r. Empty if all columns are one group.

    Raises:
        SettingError: The shapes of the factors, or the groups, do not fit each other.

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
    groups: tuple[int, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        shapes = {name: tuple(tensor.shape) for name, tensor in self.own_tensors().items()}
        d, r = shapes["left"] if self.left.dim() == 2 else (0, 0)
        needed = {"left": (d, r), "right": (r, d), "shift": (d,), "center": (d,)}
        wrong = [name for name, shape in shapes.items() if shape != needed[name]]
        if wrong:
            raise SettingError(
                f"the factors have shapes {shapes}, but they must be left (d, r), right (r, d), shift (d,) and center "
                f"(d,); check {wrong[0]}"
            )
        if self.groups and (min(self.groups) < 1 or sum(self.groups) != r):
            raise SettingError(f"groups is {self.groups}, but it must be positive numbers whose sum is the rank, {r}")

    @classmethod
    def constant(cls, shift: Float[Tensor, " d"], *, normalization: Normalization = "none") -> AffineEdit:
        """Return the edit that adds a vector to every token.

        Args:
            shift: Vector to add, shape (d,).
            normalization: How the result is rescaled; see ``LayerEdit``.
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

    def own_tensors(self) -> dict[str, Tensor]:
        """Return ``left`` and ``right``, and ``shift`` and ``center`` unless they are None."""
        named = {"left": self.left, "right": self.right, "shift": self.shift, "center": self.center}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def linear_part(self, columns: Float[Tensor, "d m"]) -> Float[Tensor, "d m"]:
        """Return scale C + left (right C) for a matrix C of columns, in the data type of C."""
        left, right = (factor.to(columns.device, columns.dtype) for factor in (self.left, self.right))
        return self.scale * columns + left @ (right @ columns)

    def constant_part(self) -> Float[Tensor, " d"] | None:
        """Return c = shift - scale center - left (right center) in float64 on the CPU, or None if it is zero.

        With it, y = x + scale x + left (right x) + c.
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
        """Return the edit with left -> Q left, right -> right Q^T, shift -> Q shift, for a random rotation Q.

        Each group has a rotation of its own; the shift is rotated with the first group.

        Args:
            seed: Seed of the rotations.
        """
        sizes = list(self.groups) or [self.rank]
        sides = list(zip(torch.split(self.left, sizes, dim=1), torch.split(self.right, sizes), strict=True))
        rotated = []
        shift = self.shift
        for number, (left, right) in enumerate(sides):
            columns = [left, right.T, *([self.shift[:, None]] if self.shift is not None and number == 0 else [])]
            span = torch.cat([column.double().cpu() for column in columns], dim=1)
            rotate = random_rotation(span, seed * len(sides) + number)
            rotated.append((rotate(left), rotate(right.T).T))
            if self.shift is not None and number == 0:
                shift = rotate(self.shift[:, None])[:, 0].contiguous()
        lefts, rights = zip(*rotated, strict=True)
        return dataclasses.replace(
            self, left=torch.cat(lefts, dim=1).contiguous(), right=torch.cat(rights).contiguous(), shift=shift
        )

    def reversed(self) -> AffineEdit:
        """Return the edit that adds the opposite change, y = x - (scale z + left (right z) + shift).

        For SEA with ``combine="both"``, this is the edit with positives and negatives exchanged.
        """
        shift = None if self.shift is None else -self.shift
        # Subtracted from 0, since -0.0 would have another hash than 0.0.
        return dataclasses.replace(self, left=-self.left, scale=0.0 - self.scale, shift=shift)

    def scaled(self, factor: float) -> AffineEdit:
        """Return the edit whose change is multiplied by a factor, y = x + factor (scale z + left (right z) + shift).

        Args:
            factor: Finite number.

        Raises:
            SettingError: The edit is rescaled, so that its change is not linear in the factors.
        """
        if self.normalization != "none":
            raise SettingError(
                f"the edit is rescaled (normalization is '{self.normalization}'), so its change cannot be multiplied; "
                "fit it with normalization='none'"
            )
        shift = None if self.shift is None else factor * self.shift
        return dataclasses.replace(self, left=factor * self.left, scale=factor * self.scale, shift=shift)

    def _make(self, device: torch.device, dtype: torch.dtype) -> EditFunction:
        # Both factors are row-major: a product with a thin column-major matrix takes more than twice as long.
        inner = move_factor(self.right, device, dtype).contiguous().T
        outer = move_factor(self.left.T, device, dtype).contiguous()
        constant = self.constant_part()
        shift = None if constant is None else constant.to(device, dtype)
        scale, rescale = self.scale, self.normalization == "token"

        def edit(tokens: Tensor, strength: Strength) -> Tensor:
            # Use the custom operator only under autograd or torch.compile; the plain function avoids dispatch overhead.
            if torch.is_grad_enabled() or torch.compiler.is_compiling():
                given = strength if isinstance(strength, Tensor) else inner.new_full((), strength)
                found: Tensor = torch.ops.sealign.edit_tokens(tokens, inner, outer, shift, scale, given, rescale)
                return found
            return edit_tokens(tokens, inner, outer, shift, scale, strength, rescale)

        if self.normalization == "feature":
            return lambda tokens, strength: _rescale_per_feature(tokens.to(dtype), edit, strength).to(tokens.dtype)
        return edit


def _rescale_per_feature(x: Tensor, edit: EditFunction, strength: Strength) -> Tensor:
    """Return x + s (q y - x) with q = |x| / |y| for each feature over the last-but-one axis."""
    if x.dim() < 2:
        raise NormalizationError("per-feature rescaling needs a (tokens, d) tensor; use normalization='token'")
    y = edit(x, 1.0)
    return torch.lerp(x, y * norm_ratio(x, y, -2), strength)
