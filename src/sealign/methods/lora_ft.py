"""LoRA-FT: supervised fine-tuning on the positives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sealign.methods.lora_training import LoRATrainingConfig, put_lora_on, train_lora
from sealign.methods.method import Attached, FitContext, Method


@dataclass(frozen=True, eq=False)
class LoRAFT(Method):
    """A LoRA trained on prompts and positives (Hu et al. 2022, arXiv 2106.09685), on every linear layer."""

    name: ClassVar[str] = "lora_ft"

    @classmethod
    def learn(cls, lesson: FitContext, config: LoRATrainingConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Train the LoRA on the positives."""
        pairs = [(item.prompt, item.positive) for item in lesson.demonstrations]
        for _ in lesson.track(range(1), "Fine-tuning", 1):
            tensors = train_lora(lesson.model, lesson.tokenizer, pairs, config, checkpoint_dir=lesson.checkpoint_dir)
        return {}, tensors

    def put_on(self, model: object, attached: Attached) -> None:
        """Put the LoRA on the model."""
        switch = put_lora_on(model, self.tensors, LoRATrainingConfig(**self.settings), attached)
        attached.on_switch = lambda on: switch.enable_adapter_layers() if on else switch.disable_adapter_layers()
