"""Outputs of llama.cpp for a GGUF export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from sealign.errors import ExportError
from sealign.export.control_vector import ARCHITECTURE, read_control_vector
from sealign.export.gguf_file import architecture_of, open_gguf, value_of
from sealign.export.verify import PROMPTS, Outputs


def llama_outputs(
    file: Path, base: Path | None, tokenizer: Any, prompts: Sequence[str] = PROMPTS, *, max_new_tokens: int = 16
) -> Outputs:
    """Return the outputs of llama.cpp for a GGUF model, or for a GGUF LoRA or a control vector with its base model.

    llama.cpp multiplies quantised weights by activations that it rounds to 8 bits, so its outputs differ from outputs
    computed with the same weights in float32 by more than rounding errors. With float32 weights they do not.

    Args:
        file: The model, the LoRA or the control vector.
        base: GGUF file of the base model; used for a LoRA and a control vector only.
        tokenizer: Tokenizer of the model; llama.cpp is given token ids.
        prompts: Prompts of at least 2 tokens each.
        max_new_tokens: Number of tokens to generate after each prompt.

    Raises:
        ExportError: The file needs a base model and none is given, or does not fit it.
    """
    reader = open_gguf(file)
    is_lora, is_vector = value_of(reader, "general.type") == "adapter", architecture_of(reader) == ARCHITECTURE
    if (is_lora or is_vector) and base is None:
        kind = "LoRA" if is_lora else "control vector"
        raise ExportError(f"'{file}' is a {kind}, which needs its base model; name the GGUF file of that with --base")
    from llama_cpp import GGML_TYPE_F32, Llama

    prompt_ids = [list(tokenizer.encode(prompt)) for prompt in prompts]
    model = Llama(
        model_path=str(base if is_lora or is_vector else file),
        lora_path=str(file) if is_lora else None,
        n_ctx=max(map(len, prompt_ids)) + max_new_tokens + 1,
        logits_all=True,
        # The default stores keys and values in 16 bits, which would hide what the file itself does.
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=False,
    )
    try:
        if is_vector:
            _set_control_vector(model, reader)
        found = [_outputs(model, ids, max_new_tokens, tokenizer.eos_token_id) for ids in prompt_ids]
    finally:
        model.close()
    return Outputs([logs for logs, _ in found], [completion for _, completion in found])


def _set_control_vector(model: Any, reader: Any) -> None:
    """Add a control vector at all layers, as llama.cpp's own programs do with ``--control-vector FILE``."""
    import ctypes

    import llama_cpp

    layers, width = llama_cpp.llama_model_n_layer(model.model), model.n_embd()
    rows = read_control_vector(reader, layers=layers, width=width)
    data = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if llama_cpp.llama_set_adapter_cvec(model.ctx, data, rows.size, width, 1, layers):
        raise ExportError("llama.cpp does not accept the control vector; give the file of the model's own edit")


def _outputs(model: Any, ids: list[int], count: int, end: int | None) -> tuple[NDArray[np.float64], list[int]]:
    """Return the log-probabilities of a prompt's tokens from the second on, and its greedy completion."""
    model.reset()
    model.eval(ids)
    scores = log_softmax(np.array(model.scores[: len(ids) - 1], dtype=np.float64), axis=-1)
    logs: NDArray[np.float64] = scores[np.arange(len(ids) - 1), ids[1:]]
    completion: list[int] = []
    for position in range(len(ids), len(ids) + count):
        token = int(np.argmax(model.scores[position - 1]))
        if token == end:
            break
        completion.append(token)
        model.eval([token])
    return logs, completion
