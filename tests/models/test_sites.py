"""Sites in every architecture: the modules found are what their names say, by the model's own arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import sealign
from sealign.errors import ModelError, SiteError
from sealign.models.recorder import Recorder
from sealign.models.sites import SITES, resolve_sites
from sealign.models.structure import decoder_layers, unwrap_model
from tests.tiny_models import CONFIGS, build_model

POST_NORMS = {
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
"""Architectures with a norm between a block's output and the residual stream."""


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_add_up_to_the_residual_stream(name: str, tiny_model: Callable[[str], Any]) -> None:
    """residual(l) = residual(l - 1) + attention(l) + mlp(l), with the architecture's own norms and factors."""
    model = tiny_model(name)
    outputs: dict[str, dict[int, torch.Tensor]] = {}
    ids = torch.randint(4, 90, (2, 7))
    for site in SITES:
        with Recorder(resolve_sites(model, site), lambda output, _: output.reshape(2, 7, -1).clone()) as recorder:
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        outputs[site] = recorder.recorded
    _, layers = decoder_layers(model)
    factor = getattr(model.config, "residual_multiplier", 1.0)
    assert sorted(outputs["mlp"]) == [0, 1, 2, 3]
    for index, layer in enumerate(layers):
        blocks = [outputs["attention"][index], outputs["mlp"][index]]
        for position, norm in enumerate(POST_NORMS.get(name, ())):
            blocks[position] = getattr(layer, norm)(blocks[position])
        expected = states[index] + factor * (blocks[0] + blocks[1])
        torch.testing.assert_close(outputs["residual"][index], expected, rtol=1e-4, atol=1e-5)
        if index + 1 < len(layers):  # the last hidden state of transformers is after the final norm
            torch.testing.assert_close(outputs["residual"][index], states[index + 1])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("site", SITES)
def test_paths_name_the_modules(name: str, site: str, tiny_model: Callable[[str], Any]) -> None:
    model = tiny_model(name)
    for resolved in resolve_sites(model, site, [3, 0]):
        assert model.get_submodule(resolved.path) is resolved.module
        assert f".{resolved.layer}" in resolved.path
    assert [resolved.layer for resolved in resolve_sites(model, site, [3, 0])] == [3, 0]


def test_mixture_of_experts_gives_the_whole_block(tiny_model: Callable[[str], Any]) -> None:
    modules = {resolved.layer: resolved.module for resolved in resolve_sites(tiny_model("deepseek_v3"), "mlp")}
    assert "MoE" in type(modules[1]).__name__
    assert "MoE" not in type(modules[0]).__name__  # the first layer of this model is dense
    assert "Sparse" in type(resolve_sites(tiny_model("mixtral"), "mlp", [0])[0].module).__name__


def test_pattern_overrides_the_search(llama: Any) -> None:
    resolved = resolve_sites(llama, "mlp", [2], module_pattern="model.layers.{layer}.mlp.down_proj")
    assert resolved[0].path == "model.layers.2.mlp.down_proj"
    assert resolved[0].module is llama.model.layers[2].mlp.down_proj
    with pytest.raises(SiteError, match=r"no module 'model.layers.2.ffn'.*candidates: .*model.layers.2.mlp"):
        resolve_sites(llama, "mlp", [2], module_pattern="model.layers.{layer}.ffn")
    with pytest.raises(SiteError, match="has no '{layer}'"):
        resolve_sites(llama, "mlp", [2], module_pattern="model.layers.2.mlp")


def test_unknown_site_and_layer(llama: Any) -> None:
    with pytest.raises(SiteError, match=r"unknown site 'mpl' \(did you mean 'mlp'\?\)"):
        resolve_sites(llama, "mpl")
    for layer in (4, -1):
        with pytest.raises(SiteError, match=f"layer {layer} is outside the model, which has layers 0 to 3"):
            resolve_sites(llama, "mlp", [layer])


def test_several_candidate_modules_are_refused_by_name(tokenizer: Any) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    model.model.layers[2].second_mlp = nn.Linear(48, 48)
    message = (
        r"^cannot identify the MLP of layer 2: 2 candidate modules \(model.layers.2.mlp: LlamaMLP, "
        r"model.layers.2.second_mlp: Linear\); name it with module_pattern$"
    )
    with pytest.raises(SiteError, match=message):
        resolve_sites(model, "mlp")
    assert len(resolve_sites(model, "mlp", [0, 1, 3])) == 3
    del model.model.layers[1].self_attn
    with pytest.raises(SiteError, match="cannot identify the attention of layer 1: 0 candidate modules"):
        resolve_sites(model, "attention")


def test_a_second_stack_of_the_same_depth_is_refused(tokenizer: Any) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    model.twin = nn.ModuleList(model.model.layers)
    assert decoder_layers(model)[0] == "model.layers"  # the one inside the decoder
    model.model.twin = model.twin
    with pytest.raises(SiteError, match="2 lists of 4 decoder layers"):
        resolve_sites(model, "mlp")


def test_a_model_without_configuration_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear has no transformers configuration"):
        resolve_sites(nn.Linear(3, 3), "mlp")


def test_wrapped_models_have_the_same_sites(tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = build_model("llama", vocab_size=len(tokenizer))
    plain = [resolved.path for resolved in resolve_sites(model, "mlp")]
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj", "q_proj"]))
    assert unwrap_model(wrapped) is model
    compiled: Any = torch.compile(model)
    assert unwrap_model(compiled) is model
    assert [resolved.path for resolved in resolve_sites(wrapped, "mlp")] == plain


def test_prompt_learning_is_refused(tokenizer: Any) -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = build_model("llama", vocab_size=len(tokenizer))
    wrapped = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ModelError, match="virtual tokens"):
        sealign.resolve_sites(wrapped, "mlp")
