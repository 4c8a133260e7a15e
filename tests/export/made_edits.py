"""Edits made by hand, with every part of an affine edit that a test asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

import sealign
from sealign.edits.edit import layer_record
from sealign.edits.record import EditRecord, model_record
from sealign.models.sites import resolve_sites
from sealign.models.structure import text_config


def affine(
    width: int, *, rank: int = 3, scale: float = 0.0, shift: bool = False, center: bool = False, seed: int = 0
) -> sealign.AffineEdit:
    """Return a random affine edit whose linear part is not symmetric."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    left, right = 0.3 * random(width, rank), 0.3 * random(rank, width)
    return sealign.AffineEdit(
        left, right, scale, random(width) if shift else None, 0.5 * random(width) if center else None
    )


def edit_of(
    model: Any,
    tokenizer: Any,
    layer_edits: Mapping[int, Any],
    *,
    site: Any = "mlp",
    strength: float = 0.6,
    normalization: Any = "none",
) -> sealign.Edit:
    """Return an edit of given layers with a complete record, so that it can be saved."""
    sites = resolve_sites(model, site, sorted(layer_edits))
    first = next(iter(layer_edits.values()))
    record = EditRecord(
        method="sea",
        config={"site": site},
        learned={},
        model=model_record(model, tokenizer),
        demonstrations_hash="0" * 64,
        fitted_on=[f"{index:016x}-{index:016x}" for index in range(7)],
        holdout=None,
        example="<user>What is 1?\n<model>One.",
        fit_seconds=0.1,
        versions={"sealign": sealign.__version__},
        tensors_hash="",
        strength=strength,
        site=site,
        feature_map=first.feature_map,
        combine=getattr(first, "combine", None),
        layers={str(found.layer): layer_record(found.path, layer_edits[found.layer], 0.1, {}) for found in sites},
    )
    return sealign.Edit(dict(layer_edits), record).with_normalization(normalization)


def random_edit(
    model: Any,
    tokenizer: Any,
    *,
    layers: Sequence[int] = (1, 3),
    site: Any = "mlp",
    strength: float = 0.6,
    normalization: Any = "none",
    **parts: Any,
) -> sealign.Edit:
    """Return a random affine edit of some layers; ``parts`` are the arguments of ``affine``."""
    width = text_config(model).hidden_size
    layer_edits = {layer: affine(width, seed=layer, **parts) for layer in layers}
    return edit_of(model, tokenizer, layer_edits, site=site, strength=strength, normalization=normalization)
