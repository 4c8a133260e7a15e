"""Activations that are saved, selected and joined, so that each source is collected once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sealign.files import read_tensors, write_tensors
from sealign.fitting.activations import Activations

ROLES = ("neutral", "positive", "negative")


def save_activations(activations: Activations, file: Path) -> None:
    """Write activations to a safetensors file that only the user may read, atomically.

    Args:
        activations: Activations of one site.
        file: File to write.
    """
    tensors = {f"{role}.{layer}": rows for role in ROLES for layer, rows in getattr(activations, role).items()}
    write_tensors(file, tensors, private=True)


def read_activations(file: Path, site: str) -> Activations:
    """Read the activations that ``save_activations`` wrote.

    Args:
        file: The safetensors file.
        site: Site of the activations.

    Raises:
        EditFileError: The file is missing, truncated or not safetensors.
    """
    roles: dict[str, dict[int, Tensor]] = {role: {} for role in ROLES}
    for name, rows in read_tensors(file).items():
        role, layer = name.split(".")
        roles[role][int(layer)] = rows
    return Activations(site, **{role: dict(sorted(by_layer.items())) for role, by_layer in roles.items()})


def select_rows(activations: Activations, rows: Sequence[int] | None) -> Activations:
    """Return the activations of some demonstrations.

    Args:
        activations: Activations of n demonstrations.
        rows: Indices of demonstrations; None selects all.
    """
    if rows is None:
        return activations

    def some(by_layer: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return {layer: matrix[list(rows)] for layer, matrix in by_layer.items()}

    return Activations(
        activations.site, some(activations.neutral), some(activations.positive), some(activations.negative)
    )


def join_activations(parts: Sequence[Activations]) -> Activations:
    """Join the activations of several sets of demonstrations.

    Args:
        parts: Activations to join, all of the same site and layers; must not be empty.
    """
    if len(parts) == 1:
        return parts[0]

    def joined(role: str) -> dict[int, Tensor]:
        return {layer: torch.cat([getattr(part, role)[layer] for part in parts]) for layer in parts[0].layers}

    return Activations(parts[0].site, joined("neutral"), joined("positive"), joined("negative"))
