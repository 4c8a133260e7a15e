"""LoRA training: what the loss counts, and an interrupted run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sealign
from sealign.demonstrations.demonstration import Demonstration
from sealign.errors import DemonstrationError, SettingError
from sealign.methods import lora_training
from sealign.methods.lora_training import LoRATrainingConfig, train_lora
from sealign.models.prompt_format import PromptFormat
from tests.tiny_models import build_model

WHICH = Demonstration("Which form?", "The blue one.", "The red one.")


def test_an_interrupted_training_continues_from_its_epoch(
    tokenizer: Any, demonstrations: list[Demonstration], tmp_path: Path
) -> None:
    import transformers
    from transformers import TrainerCallback

    model = build_model("llama", vocab_size=len(tokenizer))
    config = LoRATrainingConfig(rank=2, epochs=3, batch_size=3, learning_rate=1e-2)
    pairs = [(item, item.positive) for item in demonstrations]
    whole = train_lora(model, tokenizer, pairs, config, checkpoint_dir=tmp_path / "whole")

    class Killed(Exception):
        pass

    class Kill(TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.epoch >= 2:
                raise Killed

    real = transformers.Trainer.__init__

    def with_kill(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        self.add_callback(Kill())

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(transformers.Trainer, "__init__", with_kill)
        train_lora(model, tokenizer, pairs, config, checkpoint_dir=tmp_path / "killed")
    assert list((tmp_path / "killed").glob("checkpoint-*"))
    again = train_lora(model, tokenizer, pairs, config, checkpoint_dir=tmp_path / "killed")
    assert all(torch.allclose(tensor, again[name], atol=1e-6) for name, tensor in whole.items())


def test_trainings_share_a_checkpoint_folder(
    tokenizer: Any, demonstrations: list[Demonstration], tmp_path: Path
) -> None:
    """Each continues from its own checkpoints: other settings, methods and demonstrations have folders of their own."""
    model = build_model("llama", vocab_size=len(tokenizer))
    small: Any = {"rank": 2, "epochs": 1, "batch_size": 4, "learning_rate": 1e-2}
    fits = [
        (sealign.LoRAFTConfig(**small), demonstrations),
        (sealign.LoRAFTConfig(**small | {"seed": 1}), demonstrations),
        (sealign.LoRAFTConfig(**small), demonstrations[1:]),
        (sealign.ICDConfig(training=LoRATrainingConfig(**small)), demonstrations),
    ]
    alone = [sealign.fit_edit(model, tokenizer, items, config=config).hash for config, items in fits]
    for _ in range(2):
        found = [
            sealign.fit_edit(model, tokenizer, items, config=config, checkpoint_dir=tmp_path).hash
            for config, items in fits
        ]
        assert found == alone
    assert len(set(alone)) == len(list(tmp_path.iterdir())) == len(fits)


def test_the_prompt_and_the_padding_do_not_count(
    tokenizer: Any, demonstrations: list[Demonstration], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels are the tokens of the completion and the end token; batches are padded on the right and masked."""
    import transformers

    batches: list[dict[str, torch.Tensor]] = []

    def train(self: Any, **_: Any) -> None:
        batches.extend(self.get_train_dataloader())

    monkeypatch.setattr(transformers.Trainer, "train", train)
    model = build_model("llama", vocab_size=len(tokenizer))
    pairs = [(item, item.positive) for item in demonstrations]
    train_lora(model, tokenizer, pairs, LoRATrainingConfig(rank=1, epochs=1, batch_size=3))
    form = PromptFormat()
    expected = set()
    for item, completion in pairs:
        start = len(form.encode_prompt(tokenizer, item.prompt))
        ids = [*form.encode(tokenizer, item.prompt, completion), tokenizer.eos_token_id]
        expected.add((tuple(ids), (-100,) * start + tuple(ids[start:])))
    found = set()
    for batch in batches:
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            length = int(mask.sum())
            assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
            assert set(labels[length:].tolist()) <= {-100}
            found.add((tuple(ids[:length].tolist()), tuple(labels[:length].tolist())))
    assert [batch["input_ids"].shape[0] for batch in batches] == [3, 3, 1]
    assert found == expected


def test_too_long_an_example_is_named(tokenizer: Any) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    pairs = [(WHICH, WHICH.positive), (Demonstration("Who?", "form " * 400, "No."), "form " * 400)]
    with pytest.raises(DemonstrationError, match=r"demonstration 1 is \d+ tokens long, but the model's context is 256"):
        train_lora(model, tokenizer, pairs, LoRATrainingConfig())


def test_a_training_that_fails_leaves_no_trace(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    modules = [(name, type(module)) for name, module in model.named_modules()]

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(lora_training, "_train", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train_lora(model, tokenizer, [(WHICH, WHICH.positive)], LoRATrainingConfig())
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert "peft_config" not in vars(model)
    assert not model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank is 0, but it must be at least 1"),
        ({"alpha": 0}, "alpha is 0, but it must be above 0"),
        ({"epochs": 0}, "epochs is 0, but it must be above 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0, but it must be above 0"),
        ({"batch_size": "auto"}, "batch_size is 'auto', but it must be an integer"),
    ],
)
def test_settings_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        LoRATrainingConfig(**change)
