"""The record of an edit: everything in ``edit.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from sealign.demonstrations.splits import Holdout
from sealign.files import EDIT_FILES
from sealign.models.fingerprint import model_fingerprint, template_hash, tokenizer_hash
from sealign.models.structure import unwrap_model
from sealign.models.weights import weights_hash, weights_type
from sealign.record_files import RECORD_CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = "sealign.edit"
FORMAT_VERSION = 3

RECORD_NAME = EDIT_FILES[0]
"""File name of the record."""

TENSORS_NAME = EDIT_FILES[1]
"""File name of the tensors."""

CARD_NAME = EDIT_FILES[2]
"""File name of the model card."""


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """What was fitted at one layer.

    Attributes:
        module: Dotted path of the module whose output is edited.
        rank: Number of directions of the edit; 0 for a pure shift.
        groups: Numbers of directions that are rotated together in a random control, such as those that SEA keeps and
            those that it drops; empty if all are one group.
        scale: Multiple of the activation that an affine edit adds; 0 for a change of low rank.
        relative_change: Mean of |x' - x| / |x| over the neutral activations, at the strength of the fit.
        statistics: Further figures that the method reports for the layer, by name.
    """

    __pydantic_config__: ClassVar[Any] = RECORD_CONFIG
    module: str
    rank: int
    groups: tuple[int, ...] = ()
    scale: float
    relative_change: float
    statistics: dict[str, float]

    @property
    def rank_text(self) -> str:
        """The rank as text; the sizes of the groups if there are several, as in ``3 + 2``."""
        return " + ".join(map(str, self.groups or (self.rank,)))


@dataclass(frozen=True)
class ModelRecord:
    """The model that an edit was fitted on.

    Attributes:
        id: Name or path that it was loaded by.
        revision: Commit on the Hub, or None if not known.
        fingerprint: Configuration and shapes; see ``model_fingerprint``.
        tokenizer_hash: SHA-256 of the vocabulary.
        template_hash: SHA-256 of the chat template.
        weights_hash: Hash of the weights; see ``weights_hash``.
        weights_type: Data type of the weights; see ``weights_type``.
    """

    __pydantic_config__: ClassVar[Any] = RECORD_CONFIG
    id: str
    revision: str | None
    fingerprint: dict[str, str | int | float | bool | None]
    tokenizer_hash: str
    template_hash: str
    weights_hash: str
    weights_type: str


@dataclass(frozen=True, kw_only=True)
class EditRecord:
    """Everything in ``edit.json``.

    Attributes:
        format: Always ``sealign.edit``.
        format_version: Version of the format.
        method: Name of the method, such as ``sea``.
        strength: Strength of the edit: 0 leaves the activation unchanged, 1 applies the fitted edit in full; None for a
            method without strength.
        site: ``mlp``, ``attention`` or ``residual``; None for a method that does not edit activations.
        normalization: How edited activations are rescaled: ``token``, ``feature`` or ``none``.
        feature_map: Name of the feature map; ``identity`` for an affine edit.
        combine: Combination of the projected parts; None unless the edit has a feature map.
        layers: Mapping from the index of each edited layer to the results of its fit.
        config: Settings of the method.
        learned: Results of the fit that are not tensors, such as the heads that ITI selected.
        model: The base model.
        demonstrations_hash: SHA-256 of the demonstrations; None if there were none.
        fitted_on: ``Demonstration.hash`` of each demonstration, in order.
        holdout: The part of the given demonstrations that was left out; None if none was.
        example: Text of the first demonstration as the model read it, prompt and positive completion; None for a method
            that does not read activations.
        fit_seconds: Duration of the fit in seconds, including the collection of activations.
        versions: Versions of sealign, torch, transformers and Python.
        tensors_hash: SHA-256 of the saved tensors.
    """

    __pydantic_config__: ClassVar[Any] = RECORD_CONFIG
    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    method: str
    strength: float | None = None
    site: str | None = None
    normalization: str = "none"
    feature_map: str = "identity"
    combine: str | None = None
    layers: dict[str, LayerRecord] = field(default_factory=dict)
    config: dict[str, Any]
    learned: dict[str, Any]
    model: ModelRecord
    demonstrations_hash: str | None
    fitted_on: list[str]
    holdout: Holdout | None
    example: str | None
    fit_seconds: float
    versions: dict[str, str]
    tensors_hash: str

    @property
    def demonstrations_count(self) -> int:
        """Number of demonstrations that the method was fitted on."""
        return len(self.fitted_on)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings of the method together with what the fit learned."""
        return {**self.config, **self.learned}


def model_record(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> ModelRecord:
    """Return the record of a model and its tokenizer.

    Args:
        model: The base model; adapters and wrappers are looked through.
        tokenizer: Tokenizer of the model.
    """
    base: Any = unwrap_model(model)
    return ModelRecord(
        id=getattr(base, "name_or_path", "") or type(base).__name__,
        revision=getattr(base.config, "_commit_hash", None),
        fingerprint=model_fingerprint(model),
        tokenizer_hash=tokenizer_hash(tokenizer),
        template_hash=template_hash(tokenizer),
        weights_hash=weights_hash(model),
        weights_type=weights_type(model),
    )
