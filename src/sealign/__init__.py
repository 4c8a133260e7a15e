"""Sealign: spectral editing of activations, from demonstrations to a served model.

The main job:

    model, tokenizer = sealign.load_model("smollm2")
    demonstrations = sealign.load_demonstrations("bundled:truthfulness")
    edit = sealign.fit_edit(model, tokenizer, demonstrations)
    with sealign.apply_edit(model, edit):
        model.generate(...)

Names are imported when they are first used, so that ``import sealign`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sealign.activations import Activations as Activations
    from sealign.activations import collect_activations as collect_activations
    from sealign.apply import EditHandle as EditHandle
    from sealign.apply import apply_edit as apply_edit
    from sealign.apply import attach as attach
    from sealign.collect_config import CollectConfig as CollectConfig
    from sealign.demonstrations import Demonstration as Demonstration
    from sealign.demonstrations import load_demonstrations as load_demonstrations
    from sealign.edit import SpectralEdit as SpectralEdit
    from sealign.errors import SealignError as SealignError
    from sealign.fit import fit_edit as fit_edit
    from sealign.fit import fit_projection as fit_projection
    from sealign.fit_config import FitConfig as FitConfig
    from sealign.models import load_model as load_model
    from sealign.projection import Projection as Projection
    from sealign.prompts import PromptFormat as PromptFormat
    from sealign.sites import resolve_sites as resolve_sites

_HOMES = {
    "Activations": "activations",
    "CollectConfig": "collect_config",
    "Demonstration": "demonstrations",
    "EditHandle": "apply",
    "FitConfig": "fit_config",
    "Projection": "projection",
    "PromptFormat": "prompts",
    "SealignError": "errors",
    "SpectralEdit": "edit",
    "apply_edit": "apply",
    "attach": "apply",
    "collect_activations": "activations",
    "fit_edit": "fit",
    "fit_projection": "fit",
    "load_demonstrations": "demonstrations",
    "load_model": "models",
    "resolve_sites": "sites",
}

__version__ = "0.1.0"
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sealign' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"sealign.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
