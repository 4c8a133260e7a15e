"""The activations of texts against the model's own hidden states, one text at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sealign.errors import ActivationError
from sealign.fitting.token_activations import BATCH, collect_token_activations
from sealign.models.passages import Passage, text_passages
from sealign.models.sites import resolve_sites
from tests.tiny_models import build_model

TEXTS = ["A ferry leaves.", "The road runs downhill past the bakery and the mill.", "Copper melts."] * 4


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3"])
def test_every_token_of_every_text(name: str, tiny_model: Callable[[str], Any], tokenizer: Any) -> None:
    model = tiny_model(name)
    assert len(TEXTS) > BATCH
    found = collect_token_activations(
        model, tokenizer, text_passages(tokenizer, TEXTS), resolve_sites(model, "residual", [0, 1])
    )
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
    with pytest.raises(ActivationError, match="activations of layer 2 on texts"):
        collect_token_activations(
            model, tokenizer, text_passages(tokenizer, TEXTS), resolve_sites(model, "mlp", [1, 2])
        )


def test_of_a_completion_the_tokens_from_the_last_of_its_prompt_on(tiny_model: Callable[[str], Any]) -> None:
    model = tiny_model("llama")
    tokenizer = type("Padding", (), {"pad_token_id": 0})()
    passages = [Passage((5, 9, 8), 2), Passage((7, 11, 4, 6, 3), 4)]
    found = collect_token_activations(model, tokenizer, passages, resolve_sites(model, "residual", [2]))[2]
    with torch.no_grad():
        states = [
            model(input_ids=torch.tensor([each.ids]), output_hidden_states=True).hidden_states[3][0, each.start - 1 :]
            for each in (passages[1], passages[0])
        ]
    assert [len(each) for each in states] == [2, 2]
    torch.testing.assert_close(found, torch.cat(states), rtol=1e-4, atol=1e-4)
