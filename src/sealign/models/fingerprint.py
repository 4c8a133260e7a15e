"""Fingerprint of a model: configuration and shapes, compared before an edit is applied; hashes of its tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from sealign.errors import FingerprintError, SiteError
from sealign.models.structure import decoder_layers, text_config, unwrap_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Fingerprint = dict[str, str | int | float | bool | None]

_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "hidden_act",
    "tie_word_embeddings",
)


def model_fingerprint(model: nn.Module) -> Fingerprint:
    """Return the configuration values and shapes that identify a base model.

    Weights, number type and quantisation are not included, so that an edit can be applied to the same model in
    another precision. Adapters and other wrappers are ignored.

    Args:
        model: A decoder of transformers.

    Raises:
        ModelError: The model has no transformers configuration.
    """
    config = text_config(unwrap_model(model))
    fingerprint: Fingerprint = {}
    for field in _FIELDS:
        value = getattr(config, field, None)
        fingerprint[field] = value if isinstance(value, str | int | float | bool) else None
    fingerprint["layer_classes"] = _layer_classes(model)
    return fingerprint


def _layer_classes(model: nn.Module) -> str | None:
    """Return the classes of the decoder layers, such as ``LlamaDecoderLayer x 30``; None if they cannot be identified.

    An edit of such a model names its modules by a pattern.
    """
    try:
        names = [type(layer).__name__ for layer in decoder_layers(model)[1]]
    except SiteError:
        return None
    return ", ".join(f"{name} x {names.count(name)}" for name in dict.fromkeys(names))


def check_fingerprint(model: nn.Module, expected: Mapping[str, object], fitted_on: str) -> None:
    """Raise an error if a model is not the one that an edit was fitted on.

    Args:
        model: The model to be edited.
        expected: Fingerprint in the record of the edit.
        fitted_on: Name of the model in the record of the edit, for the message.

    Raises:
        FingerprintError: The fingerprints differ; the message names every field that differs.
    """
    actual = model_fingerprint(model)
    names = sorted(set(actual) | set(expected))
    differing = [name for name in names if actual.get(name) != expected.get(name)]
    if differing:
        listed = "; ".join(f"{n} is {actual.get(n)!r} instead of {expected.get(n)!r}" for n in differing)
        raise FingerprintError(
            f"the edit was fitted on '{fitted_on}', and this model differs: {listed}; load that model, or pass "
            "ignore_mismatch=True (--ignore-mismatch) to apply the edit nevertheless"
        )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of the vocabulary of a tokenizer, as 64 hexadecimal digits."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of the chat template of a tokenizer, or of an empty text if it has no template."""
    template = getattr(tokenizer, "chat_template", None) or ""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
