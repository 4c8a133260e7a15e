"""LoRA-FT: supervised fine-tuning on the positives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sealign.baselines.lora import LoRATraining, put_lora_on, train_lora
from sealign.baselines.method import Attached, Lesson, Method


@dataclass(frozen=True, eq=False)
class LoRAFT(Method):
    """A LoRA trained on prompts and positives (Hu et al. 2022, arXiv 2106.09685), on every linear layer."""

    name: ClassVar[str] = "lora_ft"

    @classmethod
    def learn(cls, lesson: Lesson, config: LoRATraining) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Train the LoRA on the positives."""
        pairs = [(item.prompt, item.positive) for item in lesson.demonstrations]
        for _ in lesson.track(range(1), "Fine-tuning", 1):
            tensors = train_lora(lesson.model, lesson.tokenizer, pairs, config, checkpoint_dir=lesson.checkpoint_dir)
        return {}, tensors

    def put_on(self, model: object, attached: Attached) -> None:
        """Put the LoRA on the model."""
        switch = put_lora_on(model, self.tensors, LoRATraining(**self.settings), attached)
        attached.on_switch = lambda on: switch.enable_adapter_layers() if on else switch.disable_adapter_layers()
