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
    from sealign.demonstrations.demonstration import Demonstration as Demonstration
    from sealign.demonstrations.sources import load_demonstrations as load_demonstrations
    from sealign.edits.attach import EditHandle as EditHandle
    from sealign.edits.attach import apply_edit as apply_edit
    from sealign.edits.attach import attach as attach
    from sealign.edits.edit import Edit as Edit
    from sealign.errors import SealignError as SealignError
    from sealign.fitting.activations import Activations as Activations
    from sealign.fitting.collect_config import CollectConfig as CollectConfig
    from sealign.fitting.collecting import collect_activations as collect_activations
    from sealign.methods.sea import fit_edit as fit_edit
    from sealign.methods.sea import fit_projection as fit_projection
    from sealign.methods.sea_config import FitConfig as FitConfig
    from sealign.models.loading import load_model as load_model
    from sealign.models.prompt_format import PromptFormat as PromptFormat
    from sealign.models.sites import resolve_sites as resolve_sites
    from sealign.spectral.projection import Projection as Projection

_HOMES = {
    "Activations": "fitting.activations",
    "CollectConfig": "fitting.collect_config",
    "Demonstration": "demonstrations.demonstration",
    "EditHandle": "edits.attach",
    "FitConfig": "methods.sea_config",
    "Projection": "spectral.projection",
    "PromptFormat": "models.prompt_format",
    "SealignError": "errors",
    "Edit": "edits.edit",
    "apply_edit": "edits.attach",
    "attach": "edits.attach",
    "collect_activations": "fitting.collecting",
    "fit_edit": "methods.sea",
    "fit_projection": "methods.sea",
    "load_demonstrations": "demonstrations.sources",
    "load_model": "models.loading",
    "resolve_sites": "models.sites",
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
