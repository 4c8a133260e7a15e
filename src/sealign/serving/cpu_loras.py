"""Patches of vLLM's LoRA operators for CPUs, which treat a token without an adapter as one of the last adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sealign.serving.patching import wrap


def patch_cpu_loras() -> None:
    """Patch vLLM's LoRA operators for CPUs to leave the tokens without an adapter as they are, bit for bit.

    vLLM marks these tokens by the index -1, with which its operators for CPUs look up the weights of an adapter, and so
    find the last one (its pull request 48421; the operators for GPUs skip these tokens). Its operator for the logits
    also fails, and ends the engine, if there are more tokens than requests, as with ``prompt_logprobs``. It is left out
    unless an adapter changes the logits, which no edit does.
    """
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    wrap(PunicaWrapperCPU, "add_expand", _keeping_rows("token_lora_indices"), parameters=("y",))
    wrap(PunicaWrapperCPU, "add_lora_embedding", _keeping_rows("token_lora_indices"), parameters=("y",))
    wrap(PunicaWrapperCPU, "add_lora_logits", _unless_zero, parameters=("y", "x", "lora_a_stacked"))


def _keeping_rows(indices: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a wrapper of an operator that keeps the rows of its output whose index is -1.

    Args:
        indices: Name of the attribute with the index of the adapter of each row.
    """

    def around(operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, y: Tensor, *args: Any, **kwargs: Any) -> Any:
            rows = y.view(-1, y.shape[-1])
            without = (getattr(self, indices) < 0).nonzero()[:, 0]
            kept = rows[without]
            result = operator(self, y, *args, **kwargs)
            rows[without] = kept
            return result

        return call

    return around


def _unless_zero(add_lora_logits: Callable[..., Any]) -> Callable[..., Any]:
    """Return a wrapper of the operator for the logits that does nothing if no loaded adapter changes them."""
    operator = _keeping_rows("sampler_indices")(add_lora_logits)

    def call(self: Any, y: Tensor, x: Tensor, lora_a_stacked: Tensor, *args: Any, **kwargs: Any) -> Any:
        return operator(self, y, x, lora_a_stacked, *args, **kwargs) if lora_a_stacked.any() else None

    return call
