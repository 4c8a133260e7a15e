"""LoRA-FT: supervised fine-tuning on the positives."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from sealign.baselines.lora import LoRATraining, put_lora_on, train_lora
from sealign.baselines.method import Attached, Method, make_record, settings_of
from sealign.demonstrations import Demonstration
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class LoRAFT(Method):
    """A LoRA trained on prompts and positives (Hu et al. 2022, arXiv 2106.09685), on every linear layer."""

    name: ClassVar[str] = "lora_ft"

    @classmethod
    def fit(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        demonstrations: Sequence[Demonstration],
        config: LoRATraining = LoRATraining(),
        *,
        checkpoint_dir: Path | None = None,
        track: Track = no_progress,
    ) -> Self:
        """Train the LoRA on the positives."""
        started = time.perf_counter()
        pairs = [(item.prompt, item.positive) for item in demonstrations]
        for _ in track(range(1), "Fine-tuning", 1):
            tensors = train_lora(model, tokenizer, pairs, config, checkpoint_dir=checkpoint_dir)
        settings = settings_of(config)
        seconds = time.perf_counter() - started
        return cls(make_record(cls.name, settings, model, tokenizer, demonstrations, tensors, seconds), tensors)

    def put_on(self, model: object, attached: Attached) -> None:
        """Put the LoRA on the model."""
        switch = put_lora_on(model, self.tensors, LoRATraining(**self.settings), attached)
        attached.on_switch = lambda on: switch.enable_adapter_layers() if on else switch.disable_adapter_layers()
