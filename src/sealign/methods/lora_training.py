"""Train a LoRA with PEFT and the Trainer of transformers, and install it on a model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from sealign.configuration import Config
from sealign.demonstrations.demonstration import Demonstration
from sealign.edits.handle import EditHandle
from sealign.errors import DemonstrationError, SettingError
from sealign.models.batching import pad_right, pad_token
from sealign.models.hooks import add_hook
from sealign.models.prompt_format import PromptFormat
from sealign.models.structure import context_length, decoder_of, unwrap_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


IGNORED = -100
"""Label of a token that does not count in the loss."""

_INSTALLED = "_sealign_lora"
"""Attribute of a model with an installed LoRA: its handle, and which weights were trainable before."""


class LoRATrainingConfig(Config):
    """Settings of a LoRA and of its training.

    Attributes:
        rank: Rank r of the update of each matrix. Must be at least 1.
        alpha: Scale of the update, which is multiplied by alpha / r. Must be above 0.
        epochs: Number of passes over the demonstrations. Must be above 0.
        learning_rate: Initial learning rate of AdamW, which decreases linearly to 0.
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
    """Add a LoRA to every linear layer inside a block; afterwards the model is as before."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    base = unwrap_model(model)
    _remove_copied(base)
    if any(isinstance(module, LoraLayer) for module in base.modules()):
        raise SettingError(
            "the model has a LoRA of PEFT already, beside which no other can be installed; detach it, or merge it into "
            "the model first"
        )
    required = _trainable(base)
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


def _trainable(base: Any) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in base.named_parameters()}


def _remove_copied(base: Any) -> None:
    """Remove the layers of a LoRA that was installed on the model of which this one is a copy."""
    from peft.tuners.lora import LoraLayer

    handle, required = vars(base).get(_INSTALLED, (None, {}))
    if handle is None or not handle.detached:
        return
    for path, module in list(base.named_modules()):
        if isinstance(module, LoraLayer):
            parent, _, name = path.rpartition(".")
            setattr(base.get_submodule(parent), name, module.get_base_layer())
    for attribute in (_INSTALLED, "peft_config"):
        vars(base).pop(attribute, None)
    for whole in (base, decoder_of(base)):
        for key, hook in list(whole._state_dict_hooks.items()):
            if hook is _name_as_before:
                del whole._state_dict_hooks[key]
    for name, parameter in base.named_parameters():
        parameter.requires_grad = required[name]


def train_lora(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Demonstration, str]],
    training: LoRATrainingConfig,
    *,
    checkpoint_dir: Path | None = None,
) -> dict[str, Tensor]:
    """Train a LoRA on prompts and completions, and return its tensors by PEFT's names.

    The loss is the cross-entropy of the completion and the end token, given the prompt. The model is as before when
    the training ends.

    Args:
        model: The base model.
        tokenizer: Tokenizer of the model.
        pairs: Demonstration, for its prompt, and completion of each example.
        training: Settings of the LoRA and its training.
        checkpoint_dir: Folder for a checkpoint after each epoch, so that an interrupted run continues from the last.

    Raises:
        DemonstrationError: An example is longer than the model's context.
    """
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
    model: Any, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[Demonstration, str]]
) -> list[dict[str, list[int]]]:
    prompt_format = PromptFormat().resolve(tokenizer)
    end = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    limit = context_length(model)
    rows = []
    for number, (item, completion) in enumerate(pairs):
        start = len(prompt_format.encode_prompt(tokenizer, item.prompt, history=item.history))
        ids = prompt_format.encode(tokenizer, item.prompt, completion, history=item.history) + end
        if limit is not None and len(ids) > limit:
            raise DemonstrationError(
                f"demonstration {number} is {len(ids)} tokens long, but the model's context is {limit}; shorten it or "
                "leave it out"
            )
        rows.append({"input_ids": ids, "labels": [IGNORED] * start + ids[start:]})
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

    pad, cpu = pad_token(tokenizer, adapted), torch.device("cpu")

    def collate(batch: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        # The collators of transformers pad by the tokenizer, which may have no pad token.
        ids, mask = pad_right([row["input_ids"] for row in batch], pad, cpu)
        labels, _ = pad_right([row["labels"] for row in batch], IGNORED, cpu)
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

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
    """Add a trained LoRA to a model until a handle is detached.

    Args:
        model: The base model.
        tensors: Tensors of the LoRA by PEFT's names.
        training: Settings with which it was trained.
        handle: Handle that removes it.

    Raises:
        SettingError: The model has a LoRA already.

    Returns:
        PEFT's ``LoraModel``, which switches the LoRA by ``enable_adapter_layers`` and ``disable_adapter_layers``.
    """
    from peft import set_peft_model_state_dict

    base = unwrap_model(model)
    _remove_copied(base)
    required = _trainable(base)
    adapted = handle.stack.enter_context(_injected(model, training))
    vars(base)[_INSTALLED] = handle, required
    handle.stack.callback(vars(base).pop, _INSTALLED, None)
    set_peft_model_state_dict(adapted, dict(tensors))
    adapted.eval()
    for whole in dict.fromkeys((base, decoder_of(base))):
        handle.stack.callback(whole.register_state_dict_post_hook(_name_as_before).remove)
    return adapted.base_model


def _name_as_before(_module: Any, state: dict[str, Tensor], _prefix: str, _metadata: Any) -> None:
    """Give the weights of a model the names that they have without a LoRA, which is no part of what is saved."""
    named = list(state.items())
    state.clear()
    state.update({name.replace(".base_layer.", "."): tensor for name, tensor in named if ".lora_" not in name})


def follow_handle(lora: Any, model: Any, handle: EditHandle) -> None:
    """Keep an installed LoRA at the strength of a handle: its updates are scaled by it, and disabled at 0.

    Args:
        lora: Result of ``install_lora``.
        model: The model that it was installed on.
        handle: Handle whose strength and switch it follows from the next call of the model on.
    """
    base = unwrap_model(model)
    follower = _Follower(lora, handle)
    # Both are entry points: some models call their inner decoder past the outer one.
    for entry in (base, decoder_of(base)):
        handle.stack.callback(add_hook(entry, follower, before=True))


class _Follower:
    """The hook that keeps a LoRA at the strength of a handle; a copy of the model has one with a detached handle."""

    def __init__(self, lora: Any, handle: EditHandle) -> None:
        self._lora, self._handle = lora, handle
        self._scale: float | None = None

    def __call__(self, *_: Any) -> None:
        from peft.tuners.lora import LoraLayer

        handle, lora = self._handle, self._lora
        wanted = (handle.strength or 0.0) if handle.active else 0.0
        if wanted == self._scale:
            return
        self._scale = wanted
        if not handle.active:
            lora.disable_adapter_layers()
            return
        lora.enable_adapter_layers()
        for module in lora.modules():
            if isinstance(module, LoraLayer):
                module.set_scale("default", wanted)
