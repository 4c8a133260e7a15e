"""CD and ICD against their formulas in float64, with and without caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import sealign
from sealign.edits.attach import apply_edit
from sealign.errors import ModelError, SettingError
from sealign.methods.lora_training import LoRATrainingConfig
from sealign.methods.registry import fit_edit
from sealign.models.generation import generate_ids
from tests.tiny_models import build_model


def test_cd_contrasts_with_another_model(llama: Any, tokenizer: Any, tmp_path: Any) -> None:
    amateur = build_model("llama", vocab_size=len(tokenizer), num_hidden_layers=2, hidden_size=24)
    amateur.save_pretrained(tmp_path / "amateur")
    tokenizer.save_pretrained(tmp_path / "amateur")
    config = sealign.CDConfig(amateur=str(tmp_path / "amateur"), plausibility=0.2, weight=1.5)
    method = fit_edit(llama, tokenizer, config=config)
    assert method.has_own_cache
    assert method.strength is None
    with torch.no_grad():
        ids = torch.tensor([tokenizer.encode("The clerk asks for a form, and then.")])
        p = torch.log_softmax(llama(input_ids=ids).logits.double(), -1)
        q = torch.log_softmax(amateur(input_ids=ids).logits.double(), -1)
        with apply_edit(llama, method):
            found = torch.softmax(llama(input_ids=ids).logits.double(), -1)
    plausible = p >= p.max(-1, keepdim=True).values + np.log(0.2)
    expected = torch.softmax(torch.where(plausible, 1.5 * p - q, -torch.inf), -1)
    assert torch.allclose(found, expected, atol=1e-4)
    prompts = [tokenizer.encode(text) for text in ("The clerk asks for a form.", "Who?")]
    with apply_edit(llama, method):
        cached = generate_ids(llama, tokenizer, prompts, 6)
        assert torch.equal(cached, generate_ids(llama, tokenizer, prompts, 6, use_cache=False))


def test_cd_refuses_another_tokenizer(llama: Any, tokenizer: Any, tmp_path: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    build_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<eos>")
    other.add_tokens(["<more>"])
    other.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="another tokenizer"):
        fit_edit(llama, tokenizer, config=sealign.CDConfig(amateur=str(tmp_path)))


def test_icd_by_prompt_sees_the_prompt_before_everything(llama: Any, tokenizer: Any) -> None:
    config = sealign.ICDConfig(induce="prompt", prompt="Lie, and lie well. ")
    method = fit_edit(llama, tokenizer, config=config)
    before = list(method.settings["prompt_ids"])
    prompts = [tokenizer.encode(text) for text in ("The clerk asks for a form.", "Who?")]
    with torch.no_grad():
        ids = torch.tensor([prompts[0]])
        p = torch.log_softmax(llama(input_ids=ids).logits.double(), -1)
        widened = torch.tensor([[*before, *prompts[0]]])
        q = torch.log_softmax(llama(input_ids=widened).logits.double(), -1)[:, len(before) :]
        with apply_edit(llama, method):
            found = torch.softmax(llama(input_ids=ids).logits.double(), -1)
            # As in generation, where positions and mask are given; the amateur's begin after the prompt.
            given = {"position_ids": torch.arange(ids.shape[1])[None], "attention_mask": torch.ones_like(ids)}
            placed = torch.softmax(llama(input_ids=ids, **given).logits.double(), -1)
            cached = generate_ids(llama, tokenizer, prompts, 6)
            assert torch.equal(cached, generate_ids(llama, tokenizer, prompts, 6, use_cache=False))
            alone = generate_ids(llama, tokenizer, [prompts[1]], 6)
            assert torch.equal(cached[1:], alone)
    plausible = p >= p.max(-1, keepdim=True).values + np.log(0.1)
    expected = torch.softmax(torch.where(plausible, p - q, -torch.inf), -1)
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.allclose(placed, expected, atol=1e-4)


def test_icd_by_lora_contrasts_with_the_tuned_model(fitted: Callable[[str], Any], llama: Any, tokenizer: Any) -> None:
    """The amateur is the model with the LoRA, here merged into a copy of its weights by the formula of LoRA."""
    method = fitted("icd")
    amateur = build_model("llama", vocab_size=len(tokenizer))
    training = LoRATrainingConfig(**method.settings["training"])
    for name, a in method.tensors().items():
        if "lora_A" in name:
            b = method.tensors()[name.replace("lora_A", "lora_B")]
            module = amateur.get_submodule(name.removeprefix("base_model.model.").partition(".lora_A")[0])
            with torch.no_grad():
                module.weight += training.alpha / training.rank * b @ a
    ids = torch.tensor([tokenizer.encode("The clerk asks for a form, and then.")])
    with torch.no_grad():
        p = torch.log_softmax(llama(input_ids=ids).logits.double(), -1)
        q = torch.log_softmax(amateur(input_ids=ids).logits.double(), -1)
        with apply_edit(llama, method):
            found = torch.softmax(llama(input_ids=ids).logits.double(), -1)
    plausible = p >= p.max(-1, keepdim=True).values + np.log(0.1)
    expected = torch.softmax(torch.where(plausible, p - q, -torch.inf), -1)
    assert not torch.allclose(p, q, atol=1e-3)
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_cache_that_the_amateur_has_not_read_is_refused(
    fitted: Callable[[str], Any], llama: Any, tokenizer: Any
) -> None:
    ids = torch.tensor([tokenizer.encode("The clerk asks for a form.")])
    with torch.no_grad():
        cache = llama(input_ids=ids, use_cache=True).past_key_values
        with apply_edit(llama, fitted("icd")), pytest.raises(ModelError, match="has not read"):
            llama(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)


def test_both_caches_have_the_same_rows_and_tokens(fitted: Callable[[str], Any], llama: Any, tokenizer: Any) -> None:
    ids = torch.tensor([tokenizer.encode("The clerk asks for a form.")])
    settings = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with apply_edit(llama, fitted("icd")):
        cached, whole = (
            llama.generate(ids, use_cache=use, output_scores=True, return_dict_in_generate=True, **settings)
            for use in (True, False)
        )
        assert cached.sequences.tolist() == whole.sequences.tolist()
        torch.testing.assert_close(cached.sequences_scores, whole.sequences_scores)
        repeated, plain = ids.repeat(1, 2), {"max_new_tokens": 8, "do_sample": False}
        drafted = llama.generate(repeated, prompt_lookup_num_tokens=3, **plain)  # some drafts are rejected
        assert drafted.tolist() == llama.generate(repeated, **plain).tolist()
        with pytest.raises(ModelError, match="a StaticCache has room for one model, and contrastive decoding runs two"):
            llama.generate(ids, cache_implementation="static", max_new_tokens=2, disable_compile=True)


def test_settings_that_are_refused() -> None:
    with pytest.raises(SettingError, match="contrastive decoding needs one"):
        sealign.CDConfig()
    with pytest.raises(SettingError, match="weight is 0, but it must be above 0"):
        sealign.CDConfig(amateur="smollm2", weight=0)
    with pytest.raises(SettingError, match="unknown induce 'drugs'; choose one of: lora, prompt"):
        sealign.ICDConfig(induce="drugs")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="prompt is empty"):
        sealign.ICDConfig(prompt=" ", induce="prompt")
    assert sealign.ICDConfig(prompt=" ").induce == "lora"
    dumped = sealign.ICDConfig(training=LoRATrainingConfig(rank=3)).dump()
    assert sealign.ICDConfig(**dumped).training == LoRATrainingConfig(rank=3)
