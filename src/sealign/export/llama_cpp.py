"""What llama.cpp makes of prompts with a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax

from sealign.errors import ExportError
from sealign.export.verify import PROMPTS, Outputs


def llama_outputs(
    file: Path, base: Path | None, tokenizer: Any, prompts: Sequence[str] = PROMPTS, *, max_new_tokens: int = 16
) -> Outputs:
    """Return what a GGUF model, or a GGUF LoRA beside its base file, makes of prompts in llama.cpp.

    llama.cpp multiplies quantised weights by activations that it rounds to 8 bits, so its figures differ from those
    of the same weights in float32 by more than rounding; with float32 weights they do not.

    Args:
        file: the model or the LoRA.
        base: the model that a LoRA goes on.
        tokenizer: of the model; llama.cpp is given token ids.
        prompts: each of at least 2 tokens.
        max_new_tokens: length of the completions.

    Raises:
        ExportError: the file is a LoRA and no base is given.
    """
    from gguf import GGUFReader
    from llama_cpp import GGML_TYPE_F32, Llama

    kind = GGUFReader(str(file)).fields.get("general.type")
    adapter = kind is not None and kind.contents() == "adapter"
    if adapter and base is None:
        raise ExportError(f"'{file}' is a LoRA; name the GGUF file of its base model with --base")
    prompt_ids = [list(tokenizer.encode(prompt)) for prompt in prompts]
    model = Llama(
        model_path=str(base if adapter else file),
        lora_path=str(file) if adapter else None,
        n_ctx=max(map(len, prompt_ids)) + max_new_tokens + 1,
        logits_all=True,
        # Its default keeps keys and values in 16 bits, which would hide what the file itself does.
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=False,
    )
    logs, completions = [], []
    for ids in prompt_ids:
        model.reset()
        model.eval(ids)
        scores = log_softmax(np.array(model.scores[: len(ids) - 1], dtype=np.float64), axis=-1)
        logs.append(scores[np.arange(len(ids) - 1), ids[1:]])
        completions.append(_greedy(model, len(ids), max_new_tokens, tokenizer.eos_token_id))
    model.close()
    return Outputs(logs, completions)


def _greedy(model: Any, length: int, count: int, end: int | None) -> list[int]:
    """The most probable token, again and again, up to the end token."""
    found: list[int] = []
    for position in range(length, length + count):
        token = int(np.argmax(model.scores[position - 1]))
        if token == end:
            break
        found.append(token)
        model.eval([token])
    return found
