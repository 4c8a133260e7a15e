"""Edits as they are named by a user: one folder or repository, or several that are applied together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sealign.edits.intervention import Intervention
from sealign.edits.strength import check_strength
from sealign.errors import SettingError
from sealign.fitting.edit_config import EditConfig
from sealign.methods.composition import Composition
from sealign.methods.registry import get_method, load_edit


def load_edit_source(source: str, *, strength: float | None = None) -> Intervention:
    """Load an edit, or the composition of several edits whose names are joined by a plus sign.

    Args:
        source: Folder or repository of the Hub, or several of them as ``first+second``, which are attached in this
            order. The name of an existing folder may contain a plus.
        strength: Strength to use instead of the stored one. In a composition, it applies to all parts that have a
            strength.

    Raises:
        EditFileError: An edit cannot be read.
        SettingError: The strength is not finite, or nothing that was loaded has a strength.
    """
    parts = [load_edit(name) for name in single_sources(source)]
    if strength is not None:
        value = check_strength(strength)
        if all(part.strength is None for part in parts):
            methods = " and ".join(dict.fromkeys(part.method for part in parts))
            raise SettingError(f"strength is {value}, but '{source}' ({methods}) has no strength; leave it out")
        parts = [part if part.strength is None else part.with_strength(value) for part in parts]
    return parts[0] if len(parts) == 1 else Composition(parts)


def single_sources(source: str) -> list[str]:
    """Return the folders or repositories that a source joins by plus signs, in order.

    Args:
        source: As for ``load_edit_source``.

    Example:
        >>> single_sources("edits/mild+owner/polite")
        ['edits/mild', 'owner/polite']
    """
    return [source] if Path(source).is_dir() else source.split("+")


def fit_settings(edit: Intervention) -> Mapping[str, Any]:
    """Return the settings that an edit was fitted with, in its record.

    Args:
        edit: An edit, or another intervention.

    Returns:
        Mapping from name to setting. For a composition, the settings of the first part that edits activations; empty if
        no part edits activations.
    """
    return next((part.record.config for part in edit.parts if part.modules), {})


def collection_of(edit: Intervention) -> EditConfig:
    """Return the site of an edit and the settings with which its activations were collected.

    Args:
        edit: An edit, or a composition with an edit.

    Raises:
        SettingError: No activations are edited.
    """
    settings = dict(fit_settings(edit))
    if not settings:
        raise SettingError(f"{edit.method} does not edit activations; choose an edit that does, such as one of sea")
    return EditConfig(**{name: value for name, value in settings.items() if name in EditConfig.model_fields})


def edited_layers(edit: Intervention) -> list[int]:
    """Return the indices of all layers that an edit or a composition changes, in ascending order.

    Args:
        edit: An edit, or another intervention.
    """
    return sorted({int(layer) for part in edit.parts for layer in part.record.layers})


def strength_remark(edit: Intervention, strength: float) -> str | None:
    """Return a sentence about a strength that is allowed but unusual, or None if it is not.

    Unusual are a negative strength, and one above the strength at which a method is complete: 1 for a projection, and
    for other methods 1 or the strength that was chosen for the edit.

    Args:
        edit: An edit, or another intervention, at its own strength.
        strength: Strength at which it will be applied.
    """
    if strength < 0:
        return f"strength is {strength:g}, which is negative, so that the edit acts in the opposite direction"
    for part in edit.parts:
        own, config = part.strength, get_method(part.method).config
        if own is None:
            continue
        limit = config.max_strength if issubclass(config, EditConfig) else 1.0
        if strength > (limit if math.isfinite(limit) else max(1.0, own)):
            chosen = "" if own == strength else f" and this edit's own strength is {own:g}"
            return (
                f"strength is {strength:g}, while {part.method} applies the fitted edit in full at 1{chosen}; a strong "
                "edit can break the model, which sealign evaluate measures"
            )
    return None
