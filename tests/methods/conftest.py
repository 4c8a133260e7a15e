"""Fitted methods of a tiny Llama, each fitted once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import sealign
from sealign.configuration import Config
from sealign.demonstrations.demonstration import Demonstration
from sealign.edits.intervention import Intervention
from sealign.methods.lora_training import LoRATrainingConfig
from tests.tiny_models import build_model

CONFIGS: dict[str, Config] = {
    "sea": sealign.SEAConfig(rank=(3, 2), layers=(1, 3), strength=0.7),
    "phi_sea": sealign.SEAConfig(rank=(3, 2), layers=(1, 3), feature_map="tanh"),
    "difference_operator": sealign.DifferenceOperatorConfig(layers=[1], rank=2),
    "targeted_shift": sealign.TargetedShiftConfig(layers=[1]),
    "mean_difference": sealign.MeanDifferenceConfig(layers=[1], token="last", strength=2.0),
    "iti": sealign.ITIConfig(heads=3, alpha=5.0),
    "leace": sealign.LEACEConfig(layers="1,3"),
    "icl": sealign.ICLConfig(shots=2),
    "dola": sealign.DoLaConfig(),
    "icd": sealign.ICDConfig(training=LoRATrainingConfig(rank=2, epochs=1, batch_size=4, learning_rate=1e-2)),
    "best_of_n": sealign.BestOfNConfig(n=3),
    "lora_ft": sealign.LoRAFTConfig(rank=3, epochs=1, batch_size=3, learning_rate=1e-2),
}
"""Settings for a model of 4 layers with 4 heads each, by method; CD needs an amateur in a folder."""

EDITS = ["sea", "phi_sea", "difference_operator", "targeted_shift", "mean_difference", "iti", "leace"]
"""Those that edit activations."""

ACTING = [name for name in CONFIGS if name not in ("icl", "best_of_n")]
"""Those that change logits."""


@pytest.fixture(scope="module")
def demonstrations() -> list[Demonstration]:
    return sealign.load_demonstrations("bundled:truthfulness", limit=7)


@pytest.fixture(scope="session")
def fitted(tokenizer: Any) -> Callable[[str], Any]:
    """Fit a method of ``CONFIGS`` on the tiny Llama, or return what was fitted before."""
    found: dict[str, Intervention] = {}
    items = sealign.load_demonstrations("bundled:truthfulness", limit=7)

    def fit(name: str) -> Intervention:
        if name not in found:
            model = build_model("llama", vocab_size=len(tokenizer))
            found[name] = sealign.fit_edit(model, tokenizer, items, config=CONFIGS[name])
        return found[name]

    return fit
