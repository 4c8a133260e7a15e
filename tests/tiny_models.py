"""Tiny random models built from transformers configurations, one for every architecture."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

_COMMON = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_GATED = _COMMON | {"intermediate_size": 80, "num_key_value_heads": 2}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 40}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GATED),
    "mistral": ("MistralConfig", _GATED | {"sliding_window": None}),
    "mixtral": ("MixtralConfig", _GATED | {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2Config", _GATED),
    "qwen3": ("Qwen3Config", _GATED | {"head_dim": 12}),
    "qwen3_moe": ("Qwen3MoeConfig", _GATED | _EXPERTS | {"num_experts": 3, "head_dim": 12}),
    "gemma2": ("Gemma2Config", _GATED | {"head_dim": 12, "sliding_window": 16}),
    "gemma3": ("Gemma3TextConfig", _GATED | {"head_dim": 12, "sliding_window": 16}),
    "phi3": ("Phi3Config", _GATED | {"pad_token_id": 0}),
    "olmo2": ("Olmo2Config", _GATED),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 256, "bos_token_id": 1, "eos_token_id": 1},
    ),
    "gpt_neox": ("GPTNeoXConfig", _COMMON | {"intermediate_size": 80}),
    "opt": (
        "OPTConfig",
        _COMMON | {"ffn_dim": 80, "word_embed_proj_dim": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1},
    ),
    "falcon": ("FalconConfig", _COMMON | {"bos_token_id": 1, "eos_token_id": 1}),
    "starcoder2": ("Starcoder2Config", _GATED | {"sliding_window": None}),
    "granite": ("GraniteConfig", _GATED | {"residual_multiplier": 0.5}),
    "smollm3": ("SmolLM3Config", _GATED | {"pad_token_id": 0}),
    "deepseek_v3": (
        "DeepseekV3Config",
        _GATED
        | _EXPERTS
        | {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
        },
    ),
}
"""Configuration class and settings by architecture; layers, widths and ranks differ from one another."""

OTHER_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "hidden_size": 48,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 16,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 1,
        },
    ),
    "bloom": ("BloomConfig", {"hidden_size": 48, "n_layer": 4, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1}),
    "lfm2": (
        "Lfm2Config",
        _GATED
        | {
            "block_ff_dim": 80,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "block_multiple_of": 16,
            "conv_L_cache": 3,
        },
    ),
    "mamba": ("MambaConfig", {"hidden_size": 48, "num_hidden_layers": 4, "state_size": 8, "use_mambapy": False}),
}
"""Decoders with distances in the row, recurrent state or short convolutions, which packing and caches may break."""


_HYBRID = _GATED | {"layer_types": ["linear_attention", "full_attention"] * 2}
_DELTA_NET = _HYBRID | {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_GPT = {"n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 256, "bos_token_id": 1, "eos_token_id": 1}
_MAMBA = {"hidden_size": 48, "num_hidden_layers": 4, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
_GRANITE_HYBRID = _HYBRID | {
    "layer_types": ["mamba", "attention"] * 2,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 64,
    "mamba_n_heads": 8,
    "mamba_d_head": 12,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
}

UNUSUAL_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = OTHER_CONFIGS | {
    "mpt": ("MptConfig", {"d_model": 48, "n_layers": 4, "n_heads": 4, "max_seq_len": 256}),
    "dbrx": (
        "DbrxConfig",
        {
            "d_model": 48,
            "n_layers": 4,
            "n_heads": 4,
            "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 3, "moe_top_k": 2},
        },
    ),
    "openai-gpt": ("OpenAIGPTConfig", _GPT),
    "gptj": ("GPTJConfig", _GPT | {"rotary_dim": 8}),
    "ctrl": ("CTRLConfig", {"n_embd": 48, "n_layer": 4, "n_head": 4, "dff": 80, "n_positions": 256}),
    "xglm": (
        "XGLMConfig",
        {"d_model": 48, "num_layers": 4, "attention_heads": 4, "ffn_dim": 80, "max_position_embeddings": 256},
    ),
    "cohere": ("CohereConfig", _GATED | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}),
    "glm4": ("Glm4Config", _GATED | {"head_dim": 12, "pad_token_id": 0, "eos_token_id": 1}),
    "llama4_text": (
        "Llama4TextConfig",
        _GATED
        | {
            "head_dim": 12,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 80,
            "attention_chunk_size": 64,
            "pad_token_id": 0,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        _GATED
        | {
            "head_dim": 12,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "pad_token_id": 0,
            "eos_token_id": 1,
        },
    ),
    "granitemoeshared": (
        "GraniteMoeSharedConfig",
        _GATED | {"num_local_experts": 3, "num_experts_per_tok": 2, "shared_intermediate_size": 64},
    ),
    "granite4_dense": ("GraniteMoeHybridConfig", _GRANITE_HYBRID | {"num_local_experts": 0}),
    "granite4_moe": ("GraniteMoeHybridConfig", _GRANITE_HYBRID | {"num_local_experts": 3}),
    "jamba": (
        "JambaConfig",
        _GATED
        | {
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        _DELTA_NET | _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 40},
    ),
    "qwen3_5_text": (
        "Qwen3_5TextConfig",
        _DELTA_NET
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
            }
        },
    ),
    "falcon_h1": (
        "FalconH1Config",
        _GATED | {"mamba_d_ssm": 48, "mamba_n_heads": 4, "mamba_d_head": 12, "mamba_d_state": 8, "mamba_n_groups": 1},
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        _GATED
        | {
            "lru_width": 48,
            "attention_window_size": 64,
            "head_dim": 12,
            "block_types": ["recurrent", "attention"],
            "eos_token_id": 1,
        },
    ),
    "mamba2": ("Mamba2Config", _MAMBA | {"num_heads": 8, "head_dim": 12, "state_size": 16, "n_groups": 1}),
    "rwkv": (
        "RwkvConfig",
        _MAMBA | {"attention_hidden_size": 48, "intermediate_size": 80, "context_length": 256},
    ),
    "gemma3n_text": (
        "Gemma3nTextConfig",
        _GATED
        | {
            "head_dim": 12,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 400,
            "num_kv_shared_layers": 2,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "intermediate_size": [80] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "gemma4_text": (
        "Gemma4TextConfig",
        _GATED
        | {
            "head_dim": 12,
            "global_head_dim": 12,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 400,
            "num_kv_shared_layers": 0,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}
"""Architectures whose blocks or caches are not those of a plain decoder, in the same form."""


def build_model(name: str, *, vocab_size: int, **changes: Any) -> Any:
    """Return a random model of an architecture, in evaluation mode, float32, without dropout."""
    import transformers

    class_name, settings = (CONFIGS | UNUSUAL_CONFIGS)[name]
    config = getattr(transformers, class_name)(vocab_size=vocab_size, **(settings | changes))
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger weights than the initial ones, so that an edit is seen in the logits.
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.15)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def build_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer trained on the bundled text, with a chat template."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    text = (files("sealign.demonstrations") / "data" / "neutral.txt").read_text(encoding="utf-8")
    trained = ByteLevelBPETokenizer()
    special = ["<pad>", "<eos>", "<user>", "<model>"]
    trained.train_from_iterator(text.splitlines(), vocab_size=400, special_tokens=special, show_progress=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = (
        "{% for m in messages %}<{{ 'user' if m.role == 'user' else 'model' }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<model>{% endif %}"
    )
    return fast


def save_stand_in(source: Path, folder: Path, **changes: Any) -> Any:
    """Save a narrow random model with half the depth and the special tokens of the model in a folder.

    The vocabulary is trained on the bundled text: with the model's own, most of the time would go into logits.
    """
    from transformers import AutoConfig, AutoTokenizer

    folders = [files("sealign.demonstrations") / "data", files("sealign.demonstrations") / "data" / "behaviours"]
    texts = [file.read_text(encoding="utf-8") for data in folders for file in data.iterdir() if file.is_file()]
    tokenizer = AutoTokenizer.from_pretrained(source).train_new_from_iterator(texts, 3000, show_progress=False)
    config = AutoConfig.from_pretrained(source)
    sizes = _GATED | {"num_hidden_layers": config.num_hidden_layers // 2, "head_dim": 12}
    kept = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    length = {"max_position_embeddings": config.max_position_embeddings}
    model = build_model("llama", vocab_size=len(tokenizer), **(sizes | kept | length | changes))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    """Return what a model makes of one sentence."""
    ids = torch.tensor([tokenizer.encode("The clerk asks for a form, and then for another.")])
    found: torch.Tensor = model(input_ids=ids).logits
    return found
