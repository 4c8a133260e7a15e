"""LoRA fine-tuning with PEFT and transformers' Trainer, and an adapter that is put on a model and taken off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from sealign.configuration import Config
from sealign.edits.handle import EditHandle
from sealign.errors import DemonstrationError
from sealign.models.batching import pad_token
from sealign.models.prompt_format import PromptFormat
from sealign.models.structure import context_length, unwrap_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = "default"


class LoRATrainingConfig(Config):
    """Settings of a LoRA and of its training.

    Attributes:
        rank: Rank r of the update of each matrix. Must be at least 1.
        alpha: Numerator of the factor alpha / r by which the update is scaled. Must be above 0.
        epochs: Number of passes over the demonstrations. Must be above 0.
        learning_rate: Initial learning rate of AdamW; it falls linearly to 0.
        batch_size: Number of demonstrations per step. Must be at least 1.
        seed: Seed of the initial weights and of the order of the demonstrations.

    Raises:
        SettingError: A value is out of range.

    Example:
        >>> LoRATrainingConfig(rank=4).alpha
        16
    """

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[int, Field(gt=0)] = 16
    epochs: Annotated[float, Field(gt=0)] = 3.0
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    batch_size: Annotated[int, Field(ge=1)] = 8
    seed: int = 0


@contextmanager
def _injected(model: Any, training: LoRATrainingConfig) -> Iterator[Any]:
    """A LoRA on every linear layer, gone without a trace when the block ends."""
    from peft import LoraConfig, get_peft_model

    base = unwrap_model(model)
    required = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    had_config = "peft_config" in vars(base)
    config = LoraConfig(
        r=training.rank, lora_alpha=training.alpha, target_modules="all-linear", bias="none", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(base, config)
    try:
        yield adapted
    finally:
        adapted.unload()
        if not had_config:
            vars(base).pop("peft_config", None)
        for name, parameter in base.named_parameters():
            parameter.requires_grad = required[name]


def train_lora(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    training: LoRATrainingConfig,
    *,
    checkpoint_dir: Path | None = None,
) -> dict[str, Tensor]:
    """Fine-tune a LoRA on prompts and completions, and return its tensors by PEFT's names; the model stays as it was.

    The loss is the cross-entropy of the completion and the end token; the prompt is not learnt.

    Args:
        model: the base model.
        tokenizer: its own.
        pairs: prompt and completion of each example.
        training: settings.
        checkpoint_dir: where each epoch is kept, so that a killed run continues from the last.

    Raises:
        DemonstrationError: an example is longer than the model's context.
    """
    import tempfile

    from peft import get_peft_model_state_dict

    rows = _encode(model, tokenizer, pairs)
    before = unwrap_model(model).training
    with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng():
        torch.manual_seed(training.seed)
        with _injected(model, training) as adapted:
            try:
                _train(adapted, tokenizer, rows, training, checkpoint_dir or Path(scratch), checkpoint_dir is not None)
                found = get_peft_model_state_dict(adapted)
                return {name: tensor.detach().float().cpu().clone() for name, tensor in found.items()}
            finally:
                adapted.train(before)


def _encode(
    model: Any, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> list[dict[str, list[int]]]:
    prompt_format = PromptFormat().resolve(tokenizer)
    end = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    limit = context_length(model)
    rows = []
    for number, (prompt, completion) in enumerate(pairs):
        start = len(prompt_format.encode_prompt(tokenizer, prompt))
        ids = prompt_format.encode(tokenizer, prompt, completion) + end
        if limit is not None and len(ids) > limit:
            raise DemonstrationError(
                f"demonstration {number} is {len(ids)} tokens long, but the model's context is {limit}; shorten it or "
                "leave it out"
            )
        rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return rows


def _train(
    adapted: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, list[int]]],
    training: LoRATrainingConfig,
    folder: Path,
    keep: bool,
) -> None:
    from transformers import PrinterCallback, Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    pad = pad_token(tokenizer)

    def collate(batch: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in batch)

        def padded(name: str, value: int) -> Tensor:
            return torch.tensor([list(row[name]) + [value] * (width - len(row[name])) for row in batch])

        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in batch])
        return {"input_ids": padded("input_ids", pad), "labels": padded("labels", -100), "attention_mask": mask}

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=training.batch_size,
        num_train_epochs=training.epochs,
        learning_rate=training.learning_rate,
        seed=training.seed,
        data_seed=training.seed,
        save_strategy="epoch" if keep else "no",
        save_total_limit=1,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=adapted.device.type == "cpu",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    trainer = Trainer(model=adapted, args=arguments, train_dataset=rows, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    last = get_last_checkpoint(str(folder)) if keep and folder.is_dir() else None  # type: ignore[no-untyped-call]
    trainer.train(resume_from_checkpoint=last)


def install_lora(model: Any, tensors: Mapping[str, Tensor], training: LoRATrainingConfig, handle: EditHandle) -> Any:
    """Add a trained LoRA to a model, and return the object that switches it with ``enable_adapter_layers``."""
    from peft import set_peft_model_state_dict

    adapted = handle.stack.enter_context(_injected(model, training))
    set_peft_model_state_dict(adapted, dict(tensors))
    adapted.eval()
    return adapted.base_model
