"""The patched operators of vLLM's CPU build; they are tested on a server as well."""

from __future__ import annotations

import pytest
import torch

from sealign.serving.cpu_loras import _keeping_rows, _unless_zero


class Operators:
    """vLLM's operators for CPUs in short: weights are looked up by index, where -1 finds the last."""

    weights = torch.tensor([10.0, 20.0, 30.0])
    token_lora_indices = torch.tensor([1, -1, 0, -1])
    sampler_indices = torch.tensor([-1, 2])

    def add_expand(self, y: torch.Tensor, x: torch.Tensor) -> None:
        y.view(-1, y.shape[-1]).add_(x[:, None] * self.weights[self.token_lora_indices][:, None])

    def add_lora_logits(self, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor) -> None:
        y.add_(x * (a + self.weights[self.sampler_indices])[:, None])


@pytest.mark.parametrize("shape", [(4, 3), (2, 2, 3)])
def test_rows_without_an_adapter_are_kept_bit_for_bit(shape: tuple[int, ...]) -> None:
    y = torch.randn(shape)
    before = y.clone().view(4, 3)
    _keeping_rows("token_lora_indices")(Operators.add_expand)(Operators(), y, torch.arange(1.0, 5.0))
    found = y.view(4, 3)
    assert torch.equal(found[[1, 3]], before[[1, 3]])
    torch.testing.assert_close(found[[0, 2]], before[[0, 2]] + torch.tensor([[20.0], [30.0]]))


def test_logits_are_left_alone_unless_an_adapter_changes_them() -> None:
    operator = _unless_zero(Operators.add_lora_logits)
    prompt = torch.zeros(5, 3)  # more tokens than requests, as with the log-probabilities of prompts
    operator(Operators(), prompt, torch.ones(5, 3), torch.zeros(2))
    assert torch.equal(prompt, torch.zeros(5, 3))
    logits = torch.zeros(2, 3)
    operator(Operators(), logits, torch.ones(2, 3), torch.ones(2))
    assert torch.equal(logits, torch.tensor([[0.0] * 3, [31.0] * 3]))
