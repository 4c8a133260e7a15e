"""Structure of a decoder: its configuration, its layers, and the kinds of modules in them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sealign.errors import ModelError, SiteError

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|moe|expert", re.IGNORECASE)


def unwrap_model(model: nn.Module) -> Any:
    """Return the transformers model inside PEFT and ``torch.compile`` wrappers; other modules are returned unchanged.

    Args:
        model: A model, wrapped or not.

    Raises:
        ModelError: The model is a PEFT model with prompt learning, whose virtual tokens shift every position.

    Example:
        >>> from torch import nn
        >>> module = nn.Linear(2, 2)
        >>> unwrap_model(module) is module
        True
    """
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        return unwrap_model(inner)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ModelError(
                "the PEFT model uses prompt learning, whose virtual tokens are not part of the base model; "
                "unload the adapter or use a LoRA"
            )
        return model.get_base_model()  # type: ignore[operator]
    return model


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the text decoder of a transformers model.

    Raises:
        ModelError: The model has no transformers configuration.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ModelError(f"{type(model).__name__} has no transformers configuration; load it with AutoModelForCausalLM")
    return config.get_text_config(decoder=True)


def context_length(model: nn.Module) -> int | None:
    """Return the largest number of tokens in the context of a model, or None if its configuration gives no limit.

    Raises:
        ModelError: The model has no transformers configuration.
    """
    limit = getattr(text_config(unwrap_model(model)), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Return the path of the list of decoder layers, and the list itself.

    It is the outermost ``ModuleList`` that has as many members as the configuration has layers. If there are several,
    it is the one whose members contain an attention or feed-forward block, and then the one in the model's decoder.

    Raises:
        SiteError: There is no such list, or several; the message names the lists of the model.
    """
    model = unwrap_model(model)
    depth = text_config(model).num_hidden_layers
    found = _lists(model, depth, _has_named_block) or _lists(model, depth, has_matrix)
    if len(found) > 1 and hasattr(model, "get_decoder"):
        decoder: nn.Module = model.get_decoder()
        inside = {id(module) for module in decoder.modules()}
        found = {path: module for path, module in found.items() if id(module) in inside}
    if len(found) != 1:
        lists = [f"{p} ({len(m)})" for p, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        raise SiteError(
            f"{type(model).__name__} has {len(found)} lists of {depth} decoder layers, but exactly one is needed; "
            f"name the modules with module_pattern; lists in the model: {', '.join(lists[:12]) or 'none'}"
        )
    return next(iter(found.items()))


def _lists(model: nn.Module, depth: int, is_layer: Callable[[nn.Module], bool]) -> dict[str, nn.ModuleList]:
    """Return the outermost lists of ``depth`` modules, one of which is a layer, by their paths."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        nested = any(path.startswith(outer + ".") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == depth and not nested and any(map(is_layer, module)):
            found[path] = module
    return found


def has_matrix(module: nn.Module) -> bool:
    """Return whether a module contains a weight matrix, quantised or not."""
    # Quantised weights keep two dimensions; norms and gates have one or none.
    return any(parameter.dim() >= 2 for parameter in module.parameters())


def _has_named_block(module: nn.Module) -> bool:
    return any(
        (_FEED_FORWARD.search(name) or is_attention(name, child)) and has_matrix(child)
        for name, child in module.named_children()
    )


def is_attention(name: str, module: nn.Module) -> bool:
    """Return whether a child module of a decoder layer is an attention block, judged by its name and class."""
    return bool(_ATTENTION.search(type(module).__name__) or _ATTENTION.search(name)) and has_matrix(module)


def is_feed_forward(name: str) -> bool:
    """Return whether a name, of a child module of a decoder layer or of its class, is that of a feed-forward block."""
    return bool(_FEED_FORWARD.search(name))


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the decoder of a model: all of it but the language-model head, whose logits are costly."""
    inner = unwrap_model(model)
    decoder: nn.Module = getattr(inner, "base_model", inner)
    return decoder


def logits_kept(model: nn.Module, count: int) -> dict[str, Any]:
    """Return the argument with which a model computes the logits of its last tokens only; empty if it has none.

    Args:
        model: The model; wrappers are looked through.
        count: Number of tokens.
    """
    parameters = inspect.signature(unwrap_model(model).forward).parameters
    return {"logits_to_keep": count} if "logits_to_keep" in parameters else {}


def input_device(model: nn.Module) -> torch.device:
    """Return the device that token ids must be on."""
    embeddings: Any = unwrap_model(model).get_input_embeddings()
    device: torch.device = embeddings.weight.device
    # Offloaded weights are on the meta device until their module runs.
    return torch.device("cpu") if device.type == "meta" else device
