"""LEACE: erases what linearly separates positives from negatives, layer by layer, with ``concept-erasure``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from pydantic import field_validator
from torch import Tensor

from sealign.edits.affine_edit import AffineEdit
from sealign.edits.attach import apply_edit
from sealign.edits.edit import Edit
from sealign.errors import SettingError
from sealign.fitting.activations import Activations
from sealign.fitting.collecting import collect_activations
from sealign.fitting.edit_config import EditConfig
from sealign.methods.activation_fit import (
    LayerFit,
    build_edit,
    candidate_layers,
    chosen_layers,
    collected_before,
)
from sealign.methods.method import FitContext, Method
from sealign.models.sites import Site, resolve_sites
from sealign.models.structure import unwrap_model
from sealign.spectral.signature import layer_signature


class LEACEConfig(EditConfig):
    """Settings of LEACE; see ``EditConfig`` and ``CollectConfig`` for the common settings.

    Attributes:
        site: Site of the edit in each layer: ``mlp``, ``attention`` or ``residual``.
        layers: Layers to edit, one after another: ``all``; ``last:L``; ``first:L``; a fraction of the depth such as
            ``last:21/32``; the layer at a fraction of the depth such as ``at:13/32``; or indices such as ``4,5,-1``,
            where negative indices count from the end.

    Raises:
        SettingError: Layers are chosen by signature, or a value is out of range.

    Example:
        >>> LEACEConfig(layers="last:3").layers
        'last:3'
    """

    needs_rows: ClassVar[bool] = True
    needs_pass_per_layer: ClassVar[bool] = True
    max_strength: ClassVar[float] = 1.0

    site: Site = "residual"

    @field_validator("layers")
    @classmethod
    def _by_position(cls, layers: Any) -> Any:
        if str(layers).startswith("signature"):
            raise SettingError(f"layers is '{layers}', but LEACE needs layers by position, as in last:21/32 or 10,11")
        return layers


def _fit(context: FitContext, config: LEACEConfig) -> Edit:
    """Fit the eraser of each layer on the activations that the erasers of earlier layers leave."""
    model = unwrap_model(context.model)
    layers = candidate_layers(context, config)
    resolve_sites(model, config.site, layers, module_pattern=config.module_pattern)
    fits: dict[int, LayerFit] = {}
    with ExitStack() as stack:
        for layer in context.track(layers, "Fitting erasers", len(layers)):
            # Without checkpoints: the activations of a layer depend on the erasers before it.
            found = collect_activations(
                model,
                context.tokenizer,
                context.demonstrations,
                site=config.site,
                layers=[layer],
                config=config.collect_config(),
                module_pattern=config.module_pattern,
            )
            fits[layer] = _fit_layer(found.rows(layer), config)
            eraser = build_edit(context, LEACE.name, config.replace(strength=1.0), {layer: fits[layer]})
            stack.enter_context(apply_edit(model, eraser))
    return build_edit(context, LEACE.name, config, fits)


def _fit_activations(context: FitContext, activations: Activations, config: LEACEConfig) -> Edit:
    collected = collected_before(config, activations)
    layers = chosen_layers(context, config, collected)
    if len(layers) > 1:
        raise SettingError(
            f"layers is '{config.layers}', which is {len(layers)} layers, but LEACE fits each layer on activations "
            "that the erasers of earlier layers have changed; name one layer, or use fit_edit"
        )
    (layer,) = layers
    return build_edit(context, LEACE.name, config, {layer: _fit_layer(collected.rows(layer), config)})


def _fit_layer(rows: tuple[Tensor, Tensor, Tensor], config: LEACEConfig) -> LayerFit:
    from concept_erasure import LeaceFitter

    neutral, positive, negative = rows
    x = torch.cat([positive, negative]).double()
    z = torch.tensor([1.0, 0.0]).repeat_interleave(len(x) // 2).double()
    eraser = LeaceFitter.fit(x, z).eraser
    layer_edit = AffineEdit(
        -eraser.proj_left.float(), eraser.proj_right.float().contiguous(), center=eraser.bias.float()
    )
    figures: Mapping[str, float] = {"signature": layer_signature(positive, negative)}
    return LayerFit(layer_edit, layer_edit.relative_change(neutral, config.strength), figures)


LEACE = Method("leace", LEACEConfig, Edit, _fit, _fit_activations, packages=("concept_erasure",))
"""x' = x - L R (x - b), the smallest change of x after which no linear classifier beats the majority.

Belrose et al. 2023 (arXiv 2306.03819), theorem 4.3. Layers are erased one after another, each fitted on the activations
that the ones before it leave (section 5, concept scrubbing).
"""
