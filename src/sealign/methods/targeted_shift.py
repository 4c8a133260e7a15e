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
from sealign.fitting.token_activations import collect_token_activations
from sealign.methods.activation_fit import LayerFit, activation_method, build_edit, chosen_layers
from sealign.methods.method import FitContext
from sealign.models.passages import text_passages
from sealign.models.sites import Site, resolve_sites
from sealign.spectral.projection import Normalization
from sealign.spectral.reading_direction import reading_direction
from sealign.spectral.signature import layer_signature


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


def _fit(context: FitContext, collected: Collected, config: TargetedShiftConfig) -> Edit:
    layers = chosen_layers(context, config, collected)
    ordinary = collected.stored.text if isinstance(collected.stored, Activations) else None
    if ordinary is None:
        sites = resolve_sites(context.model, config.site, layers, module_pattern=config.module_pattern)
        passages = text_passages(context.tokenizer, ordinary_texts())
        ordinary = collect_token_activations(context.model, context.tokenizer, passages, sites, track=context.track)
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
