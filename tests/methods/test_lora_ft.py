"""LoRA-FT: what it learns, and the strength that scales its updates."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import sealign
from sealign.demonstrations.demonstration import Demonstration
from sealign.edits.attach import apply_edit, attach
from sealign.errors import SettingError
from sealign.evaluation.choices import ChoiceRequest
from sealign.evaluation.scoring import score_choices
from sealign.methods.registry import fit_edit
from tests.tiny_models import build_model, logits


def test_it_learns_the_positives(tokenizer: Any) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    items = [Demonstration("Which form?", "The blue one.", "None."), Demonstration("Who asks?", "A clerk.", "Nobody.")]
    config = sealign.LoRAFTConfig(rank=4, epochs=30, batch_size=2, learning_rate=1e-2)
    method = fit_edit(model, tokenizer, items, config=config)

    def loss() -> float:
        prompt_format = sealign.PromptFormat()
        context = prompt_format.encode_prompt(tokenizer, "Which form?")
        target = prompt_format.encode(tokenizer, "Which form?", "The blue one.")[len(context) :]
        scored = score_choices(model, [ChoiceRequest(tuple(context), (tuple(target),))])
        return -scored[0][0].log_probability / len(target)

    before = loss()
    with apply_edit(model, method):
        assert loss() < 0.5 * before
    assert loss() == before


@pytest.mark.parametrize("strength", [1.0, 0.4, -0.5, 2.0])
def test_strength_scales_the_updates(strength: float, fitted: Callable[[str], Any], llama: Any, tokenizer: Any) -> None:
    """Against weights W + strength alpha / r B A."""
    method = fitted("lora_ft")
    assert method.strength == 1.0
    merged = build_model("llama", vocab_size=len(tokenizer))
    scale = strength * method.settings["alpha"] / method.settings["rank"]
    for name, a in method.tensors().items():
        if "lora_A" in name:
            b = method.tensors()[name.replace("lora_A", "lora_B")]
            module = merged.get_submodule(name.removeprefix("base_model.model.").partition(".lora_A")[0])
            with torch.no_grad():
                module.weight += scale * b @ a
    expected = logits(merged, tokenizer)
    with apply_edit(llama, method, strength=strength):
        torch.testing.assert_close(logits(llama, tokenizer), expected, atol=1e-4, rtol=1e-4)
    with apply_edit(llama, method) as handle:
        logits(llama, tokenizer)
        handle.set_strength(strength)
        torch.testing.assert_close(logits(llama, tokenizer), expected, atol=1e-4, rtol=1e-4)
        with handle.switched(False):
            assert not torch.allclose(logits(llama, tokenizer), expected, atol=1e-4)
        torch.testing.assert_close(logits(llama, tokenizer), expected, atol=1e-4, rtol=1e-4)


def test_the_decoder_alone_is_changed_too(fitted: Callable[[str], Any], llama: Any) -> None:
    """Some code calls the inner decoder past the model."""
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = llama.model(input_ids=ids).last_hidden_state
        with apply_edit(llama, fitted("lora_ft"), strength=0.5) as handle:
            half = llama.model(input_ids=ids).last_hidden_state
            assert not torch.allclose(half, before)
            handle.set_strength(0)
            assert torch.equal(llama.model(input_ids=ids).last_hidden_state, before)
        with apply_edit(llama, fitted("lora_ft")):
            assert not torch.allclose(llama.model(input_ids=ids).last_hidden_state, half)


def test_settings_that_are_refused() -> None:
    with pytest.raises(SettingError, match="epochs is 0, but it must be above 0"):
        sealign.LoRAFTConfig(epochs=0)
    with pytest.raises(SettingError, match="unknown LoRAFTConfig setting 'ranks'"):
        sealign.LoRAFTConfig(ranks=3)  # type: ignore[call-arg]


@pytest.mark.filterwarnings("ignore:a lora_ft edit is attached to the model, and its copy", "ignore:the weights of the")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_saved_weights_are_those_of_the_base_model(
    copied: Any, fitted: Any, tokenizer: Any, tmp_path: Path
) -> None:
    llama = build_model("llama", vocab_size=len(tokenizer))  # on a shared one, transformers may leave hooks of its own
    edit, base = fitted("lora_ft"), logits(llama, tokenizer)
    with apply_edit(llama, edit):
        edited, twin = logits(llama, tokenizer), copied(llama)
        llama.save_pretrained(tmp_path)
        assert llama.model.state_dict().keys() == twin.model.state_dict().keys()
    assert llama.state_dict().keys() == twin.state_dict().keys()
    for same in (twin, AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        assert torch.equal(logits(same, tokenizer), base)
        with apply_edit(same, edit):
            torch.testing.assert_close(logits(same, tokenizer), edited)
        assert torch.equal(logits(same, tokenizer), base)
        assert all(parameter.requires_grad for parameter in same.parameters())
        assert not [name for name, _ in same.named_modules() if "lora" in name]


def test_a_second_lora_is_refused(fitted: Any, llama: Any, tokenizer: Any) -> None:
    base = logits(llama, tokenizer)
    with apply_edit(llama, fitted("lora_ft")):
        edited = logits(llama, tokenizer)
        for other in ("lora_ft", "icd"):
            with pytest.raises(
                SettingError, match="the model has a LoRA of PEFT already, beside which no other can be"
            ):
                attach(llama, fitted(other))
        assert torch.equal(logits(llama, tokenizer), edited)
    assert torch.equal(logits(llama, tokenizer), base)
