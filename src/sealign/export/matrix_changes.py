"""The changes of weight matrices that do what an edit does to the outputs of modules."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from sealign.edits.affine_edit import AffineEdit
from sealign.edits.edit import Edit
from sealign.edits.provenance import warn_of_other_weights
from sealign.errors import ExportError
from sealign.export.hook_check import check_hooks
from sealign.export.requirements import check_exportable, is_shift, serve_or_attach
from sealign.models.fingerprint import check_fingerprint
from sealign.models.output_matrices import OutputMatrix, output_matrices


@dataclass(frozen=True, eq=False)
class MatrixChange:
    """The change of a matrix W and its bias b that edits the output x = W h + b of the matrix.

    With x' = x + s (scale x + left (right x) + c), where s is the strength and c the constant part of the edit:

        W' = W + s (scale W + left (right W))
        b' = b + s (scale b + left (right b) + c)

    Attributes:
        matrix: The matrix behind the edited module.
        layer_edit: Edit of the module's output; its rescaling, if any, is left out.
        strength: Strength s of the edit.
    """

    matrix: OutputMatrix
    layer_edit: AffineEdit
    strength: float

    @property
    def bias(self) -> Float[Tensor, " out"] | None:
        """Bias b of the base model's matrix, or None if it has none."""
        found: Tensor | None = getattr(self.matrix.module, "bias", None)
        return found

    @property
    def changes_weight(self) -> bool:
        """Whether W' differs from W; False for an edit that only adds a constant vector."""
        return self.strength != 0 and not is_shift(self.layer_edit)

    @property
    def shift(self) -> Float[Tensor, " out"] | None:
        """Constant part s c of the change in float64, or None if it is zero."""
        constant = self.layer_edit.constant_part()
        return None if constant is None or self.strength == 0 else self.strength * constant

    def new_weight(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return W' in float64.

        Args:
            weight: Weight matrix W, shape (out, in).
        """
        wide = weight.double()
        return wide + self.strength * self.layer_edit.linear_part(wide)

    def new_bias(self, bias: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
        """Return b' in float64.

        Args:
            bias: Bias b, shape (out,).
        """
        new = self.new_weight(bias[:, None])[:, 0]
        return new if self.shift is None else new + self.shift.to(new.device)


@dataclass(frozen=True)
class LoraFactors:
    """The update B A of one matrix.

    Attributes:
        matrix: The matrix.
        a: A, (r, in), float32.
        b: B, (out, r), float32.
    """

    matrix: OutputMatrix
    a: Float[Tensor, "r in"]
    b: Float[Tensor, "out r"]


def matrix_changes(
    model: nn.Module, edit: Edit, *, approximate: bool = False, ignore_mismatch: bool = False
) -> list[MatrixChange]:
    """Return the change of the matrix behind each edited module, by ascending layer.

    A model with its weights is run on two tokens, with the edit at the modules and at the matrices, which must agree.
    For a model without weights, ``check_lora`` and ``check_merged`` do the same with what is to be written.

    Args:
        model: The base model. May be on the meta device.
        edit: An affine edit of modules whose output is the output of a single matrix.
        approximate: Whether to accept a rescaled edit, whose rescaling is then left out.
        ignore_mismatch: Whether to accept a model with another fingerprint.

    Raises:
        ExportError: The edit is not affine, acts on the residual stream, or acts on a module whose output is not the
            output of a single matrix, or of one that is used elsewhere, too.
        FingerprintError: The model is not the one that the edit was fitted on.
    """
    check_exportable(edit, approximate=approximate)
    affine = edit.affine_edits
    if edit.site == "residual":
        if all(is_shift(found) for found in affine.values()):
            remedy = f"export it with sealign export control-vector, or {serve_or_attach(edit)}"
        else:
            remedy = f"{serve_or_attach(edit)}, or fit one with site=mlp or site=attention"
        raise ExportError(
            f"the edit acts on the residual stream, which is a sum and not the output of a single matrix; {remedy}"
        )
    if not ignore_mismatch:
        check_fingerprint(model, edit.base_model.fingerprint, edit.base_model.id)
        warn_of_other_weights(model, edit)
    matrices = output_matrices(model, dict(zip(edit.layers, edit.modules, strict=True)))
    if not any(parameter.is_meta for parameter in model.parameters()):
        check_hooks(model, edit, matrices)
    return [MatrixChange(found, affine[found.layer], edit.strength) for found in matrices]
