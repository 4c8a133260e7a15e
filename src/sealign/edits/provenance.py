"""Warnings where an edit meets a model that is like the one it was fitted on, but is not that model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import nn

from sealign.edits.intervention import Intervention
from sealign.edits.record import ModelRecord
from sealign.errors import SealignWarning
from sealign.models.fingerprint import template_hash, tokenizer_hash
from sealign.models.structure import unwrap_model
from sealign.models.weights import are_comparable, has_weights, weights_hash, weights_type

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def warn_of_other_weights(model: nn.Module, edit: Intervention) -> None:
    """Warn if the weights of a model are not those that an edit was fitted on, such as those of a fine-tuned model.

    Nothing is said where weights cannot be compared: between data types that round differently, of a skeleton, and of a
    model that is split over several workers.

    Args:
        model: A model with the fingerprint of the edit.
        edit: Edit or other intervention.
    """
    if getattr(unwrap_model(model), "tp_size", None) or not has_weights(model):
        return
    found = weights_type(model)
    for part in edit.parts:
        record = part.base_model
        if are_comparable(found, record.weights_type) and weights_hash(model) != record.weights_hash:
            _warn(record, "this model has other weights, so that the edit may not do here what it did there")


def warn_of_other_checkpoint(found: Sequence[str] | None, edits: Iterable[Intervention]) -> None:
    """Warn if the weights of a checkpoint are not those that edits were fitted on.

    Nothing is said where weights cannot be compared, as for ``warn_of_other_weights``.

    Args:
        found: Result of ``stored_weights`` for the checkpoint.
        edits: Edits or other interventions.
    """
    for record in [part.base_model for edit in edits for part in edit.parts]:
        if found and are_comparable(found[1], record.weights_type) and found[0] != record.weights_hash:
            _warn(record, "this checkpoint has other weights, so that the edit may not do here what it did there")


def warn_of_other_tokenizer(tokenizer: PreTrainedTokenizerBase, edit: Intervention) -> None:
    """Warn if a tokenizer has another vocabulary or chat template than that of the model that an edit was fitted on.

    Args:
        tokenizer: Tokenizer of the model that is edited.
        edit: Edit or other intervention.
    """
    for part in edit.parts:
        record = part.base_model
        pairs = {
            "vocabulary": (tokenizer_hash(tokenizer), record.tokenizer_hash),
            "chat template": (template_hash(tokenizer), record.template_hash),
        }
        differing = [name for name, (found, expected) in pairs.items() if found != expected]
        if differing:
            _warn(record, f"this tokenizer has another {' and '.join(differing)}, so that prompts are read otherwise")


def _warn(record: ModelRecord, difference: str) -> None:
    revision = f" at revision {record.revision}" if record.revision else ""
    warnings.warn(
        f"the edit was fitted on '{record.id}'{revision}, and {difference}; load that model, or fit the edit again",
        SealignWarning,
        stacklevel=4,
    )
