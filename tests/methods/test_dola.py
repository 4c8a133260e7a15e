"""DoLa against the paper's formula, from the model's own hidden states in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import sealign
from sealign.edits.attach import apply_edit
from sealign.errors import SettingError
from sealign.methods.contrast import jensen_shannon
from sealign.methods.dola import candidate_layers, farthest
from sealign.methods.registry import fit_edit
from tests.tiny_models import build_model


@pytest.mark.parametrize("bucket", ["high", "low"])
def test_it_is_the_papers_formula(bucket: Any, llama: Any, tokenizer: Any) -> None:
    """From the model's own hidden states, one position at a time, in float64."""
    method = fit_edit(llama, tokenizer, config=sealign.DoLaConfig(bucket=bucket, plausibility=0.05))
    candidates = method.settings["candidates"]
    assert candidates == ([2] if bucket == "high" else [0])
    ids = torch.tensor([tokenizer.encode("The clerk asks for a form, and then.")])
    with torch.no_grad():
        output = llama(input_ids=ids, output_hidden_states=True)
        with apply_edit(llama, method):
            found = torch.softmax(llama(input_ids=ids).logits.double(), -1)[0]
        last = torch.log_softmax(output.logits.double(), -1)[0]
        early = torch.log_softmax(llama.lm_head(output.hidden_states[candidates[0]]).double(), -1)[0]
    above = last - last.max(-1, keepdim=True).values - np.log(0.05)
    expected = torch.softmax(torch.where(above >= 0, last - early, -torch.inf), -1)
    clear = (above.abs() > 1e-4).all(-1)  # float32 may take another side where a token is that near the bound
    assert int(clear.sum()) >= len(clear) // 2
    assert torch.allclose(found[clear], expected[clear], atol=1e-4)


def test_it_takes_the_layer_that_differs_most() -> None:
    generator = torch.Generator().manual_seed(3)
    final, *others = (3 * torch.randn(2, 5, 9, generator=generator) for _ in range(4))
    found = farthest(final, iter(others))
    divergences = torch.stack([jensen_shannon(final, other) for other in others])
    for row in range(2):
        for position in range(5):
            best = int(divergences[:, row, position].argmax())
            assert torch.equal(found[row, position], others[best][row, position])


def test_candidate_layers_leave_out_a_tied_embedding(tokenizer: Any) -> None:
    untied = build_model("llama", vocab_size=len(tokenizer), num_hidden_layers=9)
    tied = build_model("llama", vocab_size=len(tokenizer), num_hidden_layers=9, tie_word_embeddings=True)
    assert candidate_layers(untied, "low") == [0, 2]
    assert candidate_layers(tied, "low") == [2]
    assert candidate_layers(tied, "high") == [4, 6, 8]


def test_only_the_requested_positions_are_contrasted(llama: Any, tokenizer: Any) -> None:
    """As in generation, where the head runs on the last position alone."""
    method = fit_edit(llama, tokenizer, config=sealign.DoLaConfig())
    ids = torch.tensor([tokenizer.encode("The clerk asks for a form, and then.")])
    with torch.no_grad(), apply_edit(llama, method):
        whole = llama(input_ids=ids).logits
        last = llama(input_ids=ids, logits_to_keep=1).logits
        some = llama(input_ids=ids, logits_to_keep=torch.tensor([1, 3])).logits
    torch.testing.assert_close(last, whole[:, -1:])
    torch.testing.assert_close(some, whole[:, [1, 3]])


def test_settings_that_are_refused() -> None:
    with pytest.raises(SettingError, match="unknown bucket 'middle'; choose one of: high, low"):
        sealign.DoLaConfig(bucket="middle")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"plausibility is 2, but it must be in \[0, 1\]"):
        sealign.DoLaConfig(plausibility=2)
