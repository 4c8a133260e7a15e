"""Edits and records made by hand, for the tests of this folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sealign.edits.affine_edit import AffineEdit
from sealign.edits.edit import Edit, layer_record
from sealign.edits.feature_map_edit import FeatureMapEdit
from sealign.edits.layer_edit import LayerEdit
from sealign.edits.record import EditRecord, LayerRecord, ModelRecord
from sealign.spectral.projection import Projection

WIDTH = 11
RANKS = {1: 5, 3: 3}
"""Rank by layer."""


def make_record(**changes: Any) -> EditRecord:
    """Return the record of an affine edit of two layers with unequal ranks."""
    fingerprint: dict[str, str | int | float | bool | None] = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "rope": 1.0,
        "tie_word_embeddings": True,
        "head_dim": None,
    }
    record = EditRecord(
        method="sea",
        strength=0.7,
        site="mlp",
        normalization="token",
        layers={
            "1": LayerRecord(
                module="model.layers.1.mlp",
                rank=5,
                scale=0.0,
                relative_change=0.0625,
                groups=(3, 2),
                statistics={"overlap": 0.25, "signature": 12.25},
            ),
            "3": LayerRecord(
                module="model.layers.3.mlp", rank=3, scale=-0.5, relative_change=0.5, statistics={"signature": 1e6}
            ),
        },
        config={"rank": [3, 2], "prompt_format": {"style": "chat", "preamble": None}, "seed": 0},
        learned={},
        model=ModelRecord(
            id="owner/tiny-llama",
            revision="0f3c",
            fingerprint=fingerprint,
            tokenizer_hash="aa" * 32,
            template_hash="bb" * 32,
            weights_hash="ee" * 32,
            weights_type="float32",
        ),
        demonstrations_hash="cc" * 32,
        fitted_on=[f"{index:016x}-{index:016x}" for index in range(7)],
        holdout=None,
        example="<user>What is 1?\n<model>One.",
        fit_seconds=2.5,
        versions={"sealign": "0.1.0", "torch": "2.13.0"},
        tensors_hash="dd" * 32,
    )
    return dataclasses.replace(record, **changes)


def draw(*shape: int, seed: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def make_affine(
    width: int = WIDTH,
    rank: int = 4,
    *,
    scale: float = 0.0,
    shift: bool = False,
    center: bool = False,
    groups: tuple[int, ...] = (),
    normalization: Any = "none",
    dtype: torch.dtype = torch.float64,
    seed: int = 5,
) -> AffineEdit:
    """Return an affine edit whose directions are neither orthogonal nor of unit length."""
    columns = draw(width, 2 * rank + 2, seed=seed, dtype=dtype) / 2
    return AffineEdit(
        columns[:, :rank].contiguous(),
        columns[:, rank : 2 * rank].T.contiguous(),
        scale,
        columns[:, -1].contiguous() if shift else None,
        columns[:, -2].contiguous() if center else None,
        groups=groups,
        normalization=normalization,
    )


def make_projection(
    width: int = WIDTH,
    ranks: tuple[int, int] = (3, 2),
    *,
    centered: bool = False,
    feature_map: str = "identity",
    dtype: torch.dtype = torch.float64,
    seed: int = 4,
) -> Projection:
    """Return a projection on random subspaces that are not orthogonal to each other."""
    plus, minus = (torch.linalg.qr(draw(width, k, seed=seed + k))[0].to(dtype).contiguous() for k in ranks)
    mean = (draw(width, seed=seed) / 3).to(dtype) if centered else None
    return Projection(plus, minus, mean, feature_map)


def make_edit(
    dtype: torch.dtype = torch.float32,
    *,
    shift: bool = False,
    center: bool = False,
    feature_map: str = "identity",
    combine: Any = "both",
    **changes: Any,
) -> Edit:
    """Return an edit of layers 1 and 3 with unequal ranks; changes are of the record."""
    record = make_record(**changes)
    normalization: Any = record.normalization
    layer_edits: dict[int, LayerEdit] = {}
    for layer, rank in RANKS.items():
        if feature_map == "identity":
            layer_edits[layer] = make_affine(
                rank=rank,
                scale=0.0 if layer == 1 else -0.5,
                shift=shift,
                center=center,
                groups=(3, 2) if layer == 1 else (),
                normalization=normalization,
                dtype=dtype,
                seed=layer,
            )
        else:
            projection = make_projection(
                ranks=(rank - 2, 2), centered=center, feature_map=feature_map, dtype=dtype, seed=layer
            )
            layer_edits[layer] = FeatureMapEdit(projection, combine, normalization=normalization)
    layers = {
        name: layer_record(entry.module, layer_edits[int(name)], entry.relative_change, entry.statistics)
        for name, entry in record.layers.items()
    }
    used = None if feature_map == "identity" else combine
    return Edit(layer_edits, dataclasses.replace(record, feature_map=feature_map, combine=used, layers=layers))


def bits(tensor: Tensor) -> Any:
    """Return everything that distinguishes tensors from one another, the bits of their numbers included."""
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def assert_same(first: Edit, second: Edit) -> None:
    """Compare edits: tensors to the bit, records in all but the hash of the tensors, which is set when one is saved."""
    assert first.layers == second.layers
    assert [type(first.layer_edits[layer]) for layer in first.layers] == [
        type(second.layer_edits[layer]) for layer in second.layers
    ]
    for layer in first.layers:
        one, other = first.layer_edits[layer], second.layer_edits[layer]
        assert one.normalization == other.normalization
        assert getattr(one, "scale", None) == getattr(other, "scale", None)
        assert one.groups == other.groups
        assert getattr(one, "combine", None) == getattr(other, "combine", None)
    left, right = first.tensors(), second.tensors()
    assert {name: bits(tensor) for name, tensor in left.items()} == {name: bits(x) for name, x in right.items()}
    # Compared as text, since 1 equals 1.0 and True.
    assert repr(dataclasses.replace(first.record, tensors_hash="")) == repr(
        dataclasses.replace(second.record, tensors_hash="")
    )
    assert first.hash == second.hash


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files of a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
