"""Sealign: activation edits of language models, from demonstrations to a served model.

The main steps:

    model, tokenizer = sealign.load_model("smollm2")
    demonstrations = sealign.load_demonstrations("bundled:truthfulness")
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=sealign.SEAConfig(centered=True))
    with sealign.apply_edit(model, edit):
        model.generate(...)

Names are imported on first use, so that ``import sealign`` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sealign.demonstrations.demonstration import Demonstration as Demonstration
    from sealign.demonstrations.sources import load_demonstrations as load_demonstrations
    from sealign.edits.attach import apply_edit as apply_edit
    from sealign.edits.attach import attach as attach
    from sealign.edits.edit import Edit as Edit
    from sealign.edits.handle import EditHandle as EditHandle
    from sealign.edits.intervention import Intervention as Intervention
    from sealign.edits.layer_edit import AffineEdit as AffineEdit
    from sealign.errors import SealignError as SealignError
    from sealign.fitting.activations import Activations as Activations
    from sealign.fitting.collect_config import CollectConfig as CollectConfig
    from sealign.fitting.collecting import collect_activations as collect_activations
    from sealign.methods.best_of_n import BestOfNConfig as BestOfNConfig
    from sealign.methods.composition import Composition as Composition
    from sealign.methods.contrastive_decoding import CDConfig as CDConfig
    from sealign.methods.contrastive_decoding import ICDConfig as ICDConfig
    from sealign.methods.dola import DoLaConfig as DoLaConfig
    from sealign.methods.icl import ICLConfig as ICLConfig
    from sealign.methods.iti import ITIConfig as ITIConfig
    from sealign.methods.leace import LEACEConfig as LEACEConfig
    from sealign.methods.lora_ft import LoRAFTConfig as LoRAFTConfig
    from sealign.methods.mean_difference import MeanDifferenceConfig as MeanDifferenceConfig
    from sealign.methods.registry import fit_edit as fit_edit
    from sealign.methods.registry import fit_edit_from_activations as fit_edit_from_activations
    from sealign.methods.registry import load_edit as load_edit
    from sealign.methods.sea import SEAConfig as SEAConfig
    from sealign.methods.sea import fit_projection as fit_projection
    from sealign.models.loading import load_model as load_model
    from sealign.models.prompt_format import PromptFormat as PromptFormat
    from sealign.models.sites import resolve_sites as resolve_sites
    from sealign.spectral.projection import Projection as Projection

_MODULES = {
    "Activations": "fitting.activations",
    "AffineEdit": "edits.layer_edit",
    "BestOfNConfig": "methods.best_of_n",
    "CDConfig": "methods.contrastive_decoding",
    "CollectConfig": "fitting.collect_config",
    "Composition": "methods.composition",
    "Demonstration": "demonstrations.demonstration",
    "DoLaConfig": "methods.dola",
    "Edit": "edits.edit",
    "EditHandle": "edits.handle",
    "ICDConfig": "methods.contrastive_decoding",
    "ICLConfig": "methods.icl",
    "ITIConfig": "methods.iti",
    "Intervention": "edits.intervention",
    "LEACEConfig": "methods.leace",
    "LoRAFTConfig": "methods.lora_ft",
    "MeanDifferenceConfig": "methods.mean_difference",
    "Projection": "spectral.projection",
    "PromptFormat": "models.prompt_format",
    "SEAConfig": "methods.sea",
    "SealignError": "errors",
    "apply_edit": "edits.attach",
    "attach": "edits.attach",
    "collect_activations": "fitting.collecting",
    "fit_edit": "methods.registry",
    "fit_edit_from_activations": "methods.registry",
    "fit_projection": "methods.sea",
    "load_demonstrations": "demonstrations.sources",
    "load_edit": "methods.registry",
    "load_model": "models.loading",
    "resolve_sites": "models.sites",
}

__version__ = "0.1.0"
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'sealign' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"sealign.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
