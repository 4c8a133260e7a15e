"""The check of sites by numbers: what it refuses, on which models, and that it leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import sealign
from sealign.errors import SiteError
from sealign.models.loading import load_skeleton
from sealign.models.pretrained import auto_model
from sealign.models.sites import SITES, resolve_sites
from tests.conftest import our_hooks
from tests.tiny_models import CONFIGS, UNUSUAL_CONFIGS, build_model

MLP, ATTENTION, RESIDUAL = SITES
ADDS = "adds the residual stream itself"
NO_MLP, NO_ATTENTION = "cannot identify the MLP of layer 0", "cannot identify the attention of layer 0"
LLAMA = ("model.layers.0.mlp", "model.layers.0.self_attn", "model.layers.0")
HYBRID = ("model.layers.0.feed_forward", NO_ATTENTION, "model.layers.0")

EXPECTED: dict[str, tuple[str, str, str]] = {
    "bloom": (ADDS, ADDS, "transformer.h.0"),
    "mpt": (ADDS, "transformer.blocks.0.attn", "transformer.blocks.0"),
    "dbrx": ("transformer.blocks.0.ffn", ADDS, "transformer.blocks.0"),
    "openai-gpt": ("transformer.h.0.mlp", "has the shape of no tensor", "has the shape of no tensor"),
    "gptj": ("transformer.h.0.mlp", "transformer.h.0.attn", "transformer.h.0"),
    "gpt_neo": ("transformer.h.0.mlp", "transformer.h.0.attn", "transformer.h.0"),
    "ctrl": ("transformer.h.0.ffn", "transformer.h.0.multi_head_attention", "transformer.h.0"),
    "xglm": ("model.layers.0.fc2", "model.layers.0.self_attn", "model.layers.0"),
    "cohere": LLAMA,
    "glm4": LLAMA,
    "llama4_text": ("model.layers.0.feed_forward", "model.layers.0.self_attn", "model.layers.0"),
    "gpt_oss": LLAMA,
    "granitemoeshared": (NO_MLP, "model.layers.0.self_attn", "model.layers.0"),
    "granite4_dense": ("model.layers.0.shared_mlp", NO_ATTENTION, "model.layers.0"),
    "granite4_moe": (NO_MLP, NO_ATTENTION, "model.layers.0"),
    "jamba": HYBRID,
    "lfm2": HYBRID,
    "qwen3_next": ("model.layers.0.mlp", "model.layers.0.linear_attn", "model.layers.0"),
    "qwen3_5_text": ("model.layers.0.mlp", "model.layers.0.linear_attn", "model.layers.0"),
    "falcon_h1": ("model.layers.0.feed_forward", "model.layers.0.self_attn", "model.layers.0"),
    "recurrent_gemma": ("model.layers.0.mlp_block", NO_ATTENTION, "model.layers.0"),
    "mamba": (NO_MLP, NO_ATTENTION, "backbone.layers.0"),
    "mamba2": (NO_MLP, NO_ATTENTION, "backbone.layers.0"),
    "rwkv": ("rwkv.blocks.0.feed_forward", "rwkv.blocks.0.attention", "rwkv.blocks.0"),
    "gemma3n_text": (*LLAMA[:2], r"has the shape \(2, 3, 4, 48\), so it cannot be read as the residual stream"),
    "gemma4_text": LLAMA,
}
"""For each site, the module that computes it in the first layer, by reading the model's code, or why there is none."""


@pytest.mark.parametrize("name", UNUSUAL_CONFIGS)
def test_sites_of_unusual_architectures(name: str, tiny_model: Callable[[str], Any]) -> None:
    model = tiny_model(name)
    for site, expected in zip(SITES, EXPECTED[name], strict=True):
        if expected in dict(model.named_modules()):
            assert resolve_sites(model, site)[0].path == expected
        else:
            with pytest.raises(SiteError, match=expected):
                resolve_sites(model, site)
    assert our_hooks(model) == 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "granite", "deepseek_v3"])
def test_narrow_number_types_pass(name: str, tokenizer: Any) -> None:
    model = build_model(name, vocab_size=len(tokenizer)).bfloat16()
    for site in SITES:
        assert len(resolve_sites(model, site)) == 4


def test_the_matrix_inside_a_block_that_adds_the_residual(
    tiny_model: Callable[[str], Any], tokenizer: Any, demonstrations: Any
) -> None:
    """The MLP output of BLOOM, which is the difference of the block's output and the residual that it is given."""
    model, pattern = tiny_model("bloom"), "transformer.h.{layer}.mlp.dense_4h_to_h"
    residuals: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    ids = torch.tensor([[7, 31, 12, 55, 90]])
    (site,) = resolve_sites(model, MLP, [2], module_pattern=pattern)
    mlp = model.transformer.h[2].mlp
    hooks = [
        mlp.register_forward_hook(lambda _m, args, output: residuals.append(output - args[1])),
        site.module.register_forward_hook(lambda _m, _args, output: outputs.append(output)),
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(outputs[0], residuals[0], rtol=1e-4, atol=1e-5)
    config = sealign.SEAConfig(rank=2, layers=[2], module_pattern=pattern)
    assert sealign.fit_edit(model, tokenizer, demonstrations, config=config).modules == [site.path]
    with pytest.raises(SiteError, match=f"{ADDS}.*matrices in it: .*transformer.h.0.mlp.dense_4h_to_h"):
        resolve_sites(model, MLP, [0], module_pattern="transformer.h.{layer}.mlp")


def test_a_module_before_the_output_matrix_is_refused(llama: Any) -> None:
    """As wide as the model, but what is added to the residual stream is another matrix times it."""
    with pytest.raises(SiteError, match=r"'model.layers.1.self_attn.q_proj' is not the attention output: only \d+%"):
        resolve_sites(llama, ATTENTION, [1], module_pattern="model.layers.{layer}.self_attn.q_proj")
    with pytest.raises(SiteError, match=r"shape \(3, 4, 80\), .* the MLP output, which has 48 features"):
        resolve_sites(llama, MLP, [1], module_pattern="model.layers.{layer}.mlp.up_proj")
    # Any module of the right width can be named as a residual.
    path = "model.layers.{layer}.post_attention_layernorm"
    assert resolve_sites(llama, RESIDUAL, [1], module_pattern=path)[0].path == path.format(layer=1)


def test_numbers_that_are_not_finite_are_the_reason(tokenizer: Any) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    assert len(resolve_sites(model, RESIDUAL, [0])) == 1
    for site in SITES:
        with pytest.raises(SiteError, match=r"layer of 'model.layers.2.*' holds NaN or infinity, so nothing can be re"):
            resolve_sites(model, site, [2])


def test_layers_that_do_not_run_on_text_are_refused(tokenizer: Any, demonstrations: Any) -> None:
    """The cross-attention layers of Llama 3.2 Vision."""
    import transformers

    text = {"vocab_size": len(tokenizer), "cross_attention_layers": [1, 3], "pad_token_id": 0, "bos_token_id": 1}
    text |= CONFIGS["llama"][1] | {"eos_token_id": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    model = transformers.AutoModelForCausalLM.from_config(transformers.MllamaConfig(text_config=text)).eval()
    with pytest.raises(SiteError, match=r"layers.1.mlp' is not run on text alone; choose layers that are"):
        sealign.fit_edit(model, tokenizer, demonstrations, config=sealign.SEAConfig(rank=2, layers="last:3"))
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=sealign.SEAConfig(rank=2, layers=(0, 2)))
    assert edit.layers == [0, 2]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("DeepseekV4Config", r"layer of 'model.layers.0' have the shape \(3, 4, 4, 48\) for 3 sequences of 4 tokens"),
        ("CpmAntConfig", r"layer of 'cpmant.encoder.layers.0' have the shape \(3, 36, 48\) for 3 sequences of 4"),
        (
            "Blip2Config",
            r"Blip2ForCond\w+ cannot be run on text alone \(.*missing.*'pixel_values'\); use a model that can",
        ),
    ],
)
def test_models_whose_layers_cannot_be_read(config: str, message: str, tokenizer: Any) -> None:
    """Streams beside the tokens, tokens of a prompt before them, and images that are needed."""
    import transformers

    small: Any = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    sizes: Any = small | {"vocab_size": len(tokenizer), "dim_head": 12, "dim_ff": 64, "moe_intermediate_size": 32}
    sizes |= {"q_lora_rank": 8, "n_routed_experts": 2, "num_experts_per_tok": 1}
    if config == "Blip2Config":
        text = {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 48, "vocab_size": 300} | small
        sizes = {"text_config": text, "vision_config": small | {"image_size": 28}, "qformer_config": small}
    made = getattr(transformers, config)(**sizes)
    model = auto_model(made).from_config(made).eval()
    with pytest.raises(SiteError, match=message):
        resolve_sites(model, RESIDUAL)


def test_a_model_is_run_once_for_a_site_and_is_not_changed(tokenizer: Any) -> None:
    model = build_model("mixtral", vocab_size=len(tokenizer)).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    ids = torch.tensor([[7, 31, 12, 55, 90]])
    with torch.no_grad():
        before = model(ids).logits
        sizes: list[int] = []
        hook = model.model.register_forward_pre_hook(
            lambda _m, _args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        for _ in range(2):
            resolve_sites(model, MLP)
        resolve_sites(model, ATTENTION, [1])
        hook.remove()
        assert sizes == [12, 12]
        assert torch.equal(model(ids).logits, before)
    assert [module.training for module in model.modules()] == modes
    assert our_hooks(model) == 0


def test_models_without_values_are_not_run(stand_in: Any) -> None:
    skeleton, _ = load_skeleton(str(stand_in))
    assert len(resolve_sites(skeleton, MLP, [0, 2])) == 2
