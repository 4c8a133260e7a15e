"""LoRA-FT: supervised fine-tuning of a LoRA on the positives."""

from __future__ import annotations

from typing import Any

from sealign.edits.handle import EditHandle
from sealign.methods.lora_training import LoRATrainingConfig, follow_handle, install_lora, train_lora
from sealign.methods.method import FitContext, Method, RecordedIntervention


class LoRAFTConfig(LoRATrainingConfig):
    """Settings of LoRA fine-tuning; see ``LoRATrainingConfig``."""


class LoRAFineTuning(RecordedIntervention):
    """A LoRA of every linear layer, trained on prompts and positives (Hu et al. 2022, arXiv 2106.09685)."""

    def install(self, model: Any, handle: EditHandle) -> None:
        """Add the LoRA to the model; its updates are scaled by the strength."""
        lora = install_lora(model, self.weights, LoRATrainingConfig(**self.settings), handle)
        follow_handle(lora, model, handle)


def _fit(context: FitContext, config: LoRAFTConfig) -> LoRAFineTuning:
    pairs = [(item, item.positive) for item in context.demonstrations]
    for _ in context.track(range(1), "Fine-tuning", 1):
        folder = context.training_dir(LORA_FT.name, config)
        weights = train_lora(context.model, context.tokenizer, pairs, config, checkpoint_dir=folder)
    return LoRAFineTuning.build(context, LORA_FT.name, config, weights=weights, strength=1.0)


LORA_FT = Method("lora_ft", LoRAFTConfig, LoRAFineTuning, _fit, packages=("peft",))
"""Supervised fine-tuning of a LoRA on the positives."""
