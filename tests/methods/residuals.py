"""The residual stream of a tiny Llama without the library's own recording: what a decoder layer takes in."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import sealign
from sealign.demonstrations.demonstration import Demonstration


def stream(model: Any, ids: list[int], layer: int) -> torch.Tensor:
    """Return the residual stream after a layer, (t, d) float64, as the next layer takes it in."""
    taken: list[torch.Tensor] = []
    hook = model.model.layers[layer + 1].register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
    finally:
        hook.remove()
    return taken[0][0].double()


def residuals(model: Any, tokenizer: Any, items: list[Demonstration], layer: int) -> tuple[Any, Any]:
    """Return the residual stream after a layer at the last token of positives and negatives, (n, d) each."""
    prompt_format = sealign.PromptFormat()

    def last(prompt: str, completion: str) -> np.ndarray:
        found: np.ndarray = stream(model, prompt_format.encode(tokenizer, prompt, completion), layer)[-1].numpy()
        return found

    return (
        np.stack([last(item.prompt, item.positive) for item in items]),
        np.stack([last(item.prompt, item.negative) for item in items]),
    )
