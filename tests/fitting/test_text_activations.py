"""The activations of plain texts against the model's own hidden states, one text at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sealign.errors import ActivationError
from sealign.fitting.text_activations import BATCH, collect_text_activations
from sealign.models.sites import resolve_sites
from tests.tiny_models import build_model

TEXTS = ["A ferry leaves.", "The road runs downhill past the bakery and the mill.", "Copper melts."] * 4


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3"])
def test_every_token_of_every_text(name: str, tiny_model: Callable[[str], Any], tokenizer: Any) -> None:
    model = tiny_model(name)
    assert len(TEXTS) > BATCH
    found = collect_text_activations(model, tokenizer, TEXTS, resolve_sites(model, "residual", [0, 1]))
    encoded = sorted((tokenizer.encode(text) for text in TEXTS), key=len, reverse=True)
    for layer in (0, 1):
        with torch.no_grad():
            states = [
                model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]
                for ids in encoded
            ]
        torch.testing.assert_close(found[layer], torch.cat(states), rtol=1e-4, atol=1e-4)


def test_not_a_number_names_the_layer(tokenizer: Any) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0] = float("nan")
    with pytest.raises(ActivationError, match="activations of layer 2 on plain text"):
        collect_text_activations(model, tokenizer, TEXTS, resolve_sites(model, "mlp", [1, 2]))
