"""A GGUF file of a tiny Llama, as llama.cpp's converter lays it out, for llama.cpp and for transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind


def write_llama(model: Any, file: Path, kinds: Mapping[str, Kind] | None = None) -> Path:
    """Write a tiny Llama to a GGUF file without a vocabulary, in float32 except where ``kinds`` says otherwise.

    Args:
        model: A Llama of transformers.
        file: File to write.
        kinds: Type of a tensor by its name in the file.
    """
    config = model.config
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        stored, data = str(table.get_name(name, try_suffixes=(".weight", ".bias"))), tensor.float().numpy()
        for part, count in heads.items():
            if f".{part}." in name:  # llama.cpp rotates neighbouring features, transformers the two halves
                rows = data.shape[0] // count // 2
                data = data.reshape(count, 2, rows, -1).swapaxes(1, 2).reshape(data.shape)
        kind = (kinds or {}).get(stored, Kind.F32)
        writer.add_tensor(stored, gguf.quants.quantize(np.ascontiguousarray(data), kind), raw_dtype=kind)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
