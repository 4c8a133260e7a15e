"""Targeted shift: the mean difference, added to a token in the measure in which it resembles the demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.demonstrations.bundled import ordinary_texts
from sealign.edits.affine_edit import AffineEdit
from sealign.edits.edit import Edit
from sealign.errors import ActivationError, DegenerateError
from sealign.fitting.activations import Activations
from sealign.fitting.collect_config import TokenSetting
from sealign.fitting.collected import Collected
from sealign.fitting.edit_config import EditConfig
from sealign.fitting.text_activations import collect_text_activations
from sealign.methods.activation_fit import LayerFit, activation_method, build_edit, chosen_layers
from sealign.methods.method import FitContext
from sealign.models.sites import Site, resolve_sites
from sealign.spectral.projection import Normalization
from sealign.spectral.signature import layer_signature

RIDGE = 0.1
"""Ridge of the regression, in units of the mean squared activation of a feature over the completions."""


class TargetedShiftConfig(EditConfig):
    """Settings of the targeted shift; see ``EditConfig`` and ``CollectConfig`` for the common settings.

    Attributes:
        normalization: Norm of the activation that the edit preserves: ``token`` (of each token), ``feature`` (of each
            feature over the sequence) or ``none``.

    Example:
        >>> TargetedShiftConfig(strength=0.5).layers
        'at:15/32'
    """

    needs_rows: ClassVar[bool] = True

    site: Site = "residual"
    layers: str | Sequence[int] = "at:15/32"
    token: TokenSetting = "completion"
    normalization: Normalization = "none"


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


def _fit(context: FitContext, collected: Collected, config: TargetedShiftConfig) -> Edit:
    layers = chosen_layers(context, config, collected)
    ordinary = collected.stored.text if isinstance(collected.stored, Activations) else None
    if ordinary is None:
        sites = resolve_sites(context.model, config.site, layers, module_pattern=config.module_pattern)
        ordinary = collect_text_activations(
            context.model, context.tokenizer, ordinary_texts(), sites, track=context.track
        )
    fits = {}
    for layer in context.track(layers, "Fitting layers", len(layers)):
        try:
            fits[layer] = _fit_layer(collected.rows(layer), ordinary[layer], config)
        except ActivationError as error:
            raise type(error)(f"layer {layer}: {error}") from error
    return build_edit(context, TARGETED_SHIFT.name, config, fits)


def _fit_layer(
    rows: tuple[Tensor, Tensor, Tensor], ordinary: Float[Tensor, "t d"], config: TargetedShiftConfig
) -> LayerFit:
    neutral, positive, negative = rows
    difference = (positive.double() - negative.double()).mean(0)
    if not bool(difference.any()):
        raise DegenerateError(
            "positives and negatives have the same mean activation; use other demonstrations, or another site or token "
            "choice"
        )
    read = reading_direction(torch.cat([positive, negative]), ordinary)
    layer_edit = AffineEdit(
        difference.float()[:, None], read.float()[None].contiguous(), normalization=config.normalization
    )
    figures = {
        "shift_norm": float(difference.norm()),
        "response_to_text": float((ordinary.double() @ read).square().mean().sqrt()),
        "signature": layer_signature(positive, negative),
    }
    return LayerFit(layer_edit, layer_edit.relative_change(neutral, config.strength), figures)


TARGETED_SHIFT = activation_method("targeted_shift", TargetedShiftConfig, _fit)
"""x' = x + s v (r . x) with v the mean over demonstrations of h+ - h-, and r . x near 0 on ordinary text.

r is fitted by ridge regression: 1 on the completions of both sides, 0 on every token of a bundled ordinary text. It is
the idea of AlphaSteer (Sheng et al., arXiv 2506.07022), which learns a matrix that vanishes on benign prompts, for one
direction and with a ridge in place of a hard null space. The edit has rank 1 and no constant part, so on the output of
a matrix it is exactly a LoRA.
"""
