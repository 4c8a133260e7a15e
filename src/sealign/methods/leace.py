"""LEACE: erases what linearly separates positives from negatives, layer by layer, with ``concept-erasure``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from pydantic import field_validator
from torch import Tensor

from sealign.edits.edit import Edit, edit_output
from sealign.edits.handle import EditHandle
from sealign.edits.layer_edit import AffineEdit
from sealign.errors import SettingError
from sealign.fitting.activations import Activations
from sealign.fitting.collecting import collect_activations
from sealign.fitting.edit_config import EditConfig
from sealign.methods.activation_fit import LayerFit, build_edit, candidate_layers, collected_rows
from sealign.methods.method import FitContext, Method
from sealign.models.sites import Site, resolve_sites
from sealign.spectral.signature import signature


class LEACEConfig(EditConfig):
    """Settings of LEACE; see ``EditConfig`` and ``CollectConfig`` for those not listed.

    Attributes:
        site: Where the edit acts. Default: the residual stream.
        layers: Layers whose outputs are erased, one after another; not by signature.

    Raises:
        SettingError: Layers are chosen by signature, or a value is out of range.

    Example:
        >>> LEACEConfig(layers="last:3").layers
        'last:3'
    """

    site: Site = "residual"

    @field_validator("layers")
    @classmethod
    def _by_position(cls, layers: Any) -> Any:
        if str(layers).startswith("signature"):
            raise SettingError(f"layers is '{layers}', but LEACE needs layers by position, as in last:21/32 or 10,11")
        return layers


def _fit(context: FitContext, config: LEACEConfig) -> Edit:
    """Fit the eraser of each layer on the activations that the erasers of earlier layers leave."""
    layers = candidate_layers(context, config)
    sites = resolve_sites(context.model, config.site, layers, module_pattern=config.module_pattern)
    fits: dict[int, LayerFit] = {}
    with ExitStack() as stack:
        for site in context.track(sites, "Fitting erasers", len(sites)):
            # Without checkpoints: the activations of a layer depend on the erasers before it.
            found = collect_activations(
                context.model,
                context.tokenizer,
                context.demonstrations,
                site=config.site,
                layers=[site.layer],
                config=config.collect_config(),
                module_pattern=config.module_pattern,
            )
            fits[site.layer] = _fit_layer(
                found.neutral[site.layer], found.positive[site.layer], found.negative[site.layer], config
            )
            handle = EditHandle(build_edit(context, LEACE.name, config.replace(strength=1.0), fits))
            stack.callback(handle.detach)
            edit_output(site.module, fits[site.layer].layer_edit, handle)
    return build_edit(context, LEACE.name, config, fits)


def _fit_activations(context: FitContext, activations: Activations, config: LEACEConfig) -> Edit:
    layers = candidate_layers(context, config)
    if len(layers) > 1:
        raise SettingError(
            f"layers is '{config.layers}', {len(layers)} layers, but LEACE fits each on activations that earlier "
            "erasers have changed; name one layer, or use fit_edit"
        )
    (layer,) = layers
    return build_edit(
        context, LEACE.name, config, {layer: _fit_layer(*collected_rows(config, activations).rows(layer), config)}
    )


def _fit_layer(neutral: Tensor, positive: Tensor, negative: Tensor, config: LEACEConfig) -> LayerFit:
    from concept_erasure import LeaceFitter

    x = torch.cat([positive, negative]).double()
    z = torch.tensor([1.0, 0.0]).repeat_interleave(len(x) // 2).double()
    eraser = LeaceFitter.fit(x, z).eraser
    layer_edit = AffineEdit(
        -eraser.proj_left.float(), eraser.proj_right.float().contiguous(), center=eraser.bias.float()
    )
    figures: Mapping[str, float] = {"signature": signature(positive, negative)}
    return LayerFit(layer_edit, layer_edit.relative_change(neutral, config.strength), figures)


LEACE = Method("leace", LEACEConfig, Edit, _fit, _fit_activations, packages=("concept_erasure",))
"""x' = x - L R (x - b), the smallest change of x after which no linear classifier beats the majority.

Belrose et al. 2023 (arXiv 2306.03819), theorem 4.3. Layers are erased one after another, each fitted on the activations
that the ones before it leave (section 5, concept scrubbing).
"""
