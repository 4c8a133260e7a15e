"""What is known of an edit beside its tensors: the contents of ``edit.json``, read strictly."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from sealign.errors import EditFileError
from sealign.models.fingerprint import model_fingerprint, template_hash, tokenizer_hash
from sealign.models.structure import unwrap_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = "sealign.edit"
FORMAT_VERSION = 1

_STRICT: Any = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


@dataclass(frozen=True)
class EditSettings:
    """How an edit edits, unless a call says otherwise.

    Attributes:
        site: where it edits: ``mlp``, ``attention`` or ``residual``.
        combine: ``both``, ``positive``, ``negative``, ``average`` or ``reversed``.
        normalization: ``token``, ``feature`` or ``none``.
        strength: how far from the activation to its edit; 0 is no edit, 1 the whole.
        feature_map: ``identity``, ``squared_exponential``, ``tanh`` or ``elu``.
        centered: whether the projections act about the neutral mean.
    """

    __pydantic_config__: ClassVar[Any] = _STRICT
    site: str
    combine: str
    normalization: str
    strength: float
    feature_map: str
    centered: bool


@dataclass(frozen=True)
class LayerRecord:
    """What was learnt at one layer.

    Attributes:
        module: dotted path of the module whose output is edited.
        rank_positive, rank_negative: k+ and k-.
        explained_variance_positive, explained_variance_negative: shares of variance reached, in (0, 1].
        energy_positive, energy_negative: sums of all squared singular values of the cross-covariances.
        relative_change: mean over the neutral activations of |x' - x| / |x|, at the edit's settings.
        signature: sum of singular values of the cross-covariance of activations with labels.
    """

    __pydantic_config__: ClassVar[Any] = _STRICT
    module: str
    rank_positive: int
    rank_negative: int
    explained_variance_positive: float
    explained_variance_negative: float
    energy_positive: float
    energy_negative: float
    relative_change: float
    signature: float


@dataclass(frozen=True)
class ModelRecord:
    """Which model an edit was fitted on.

    Attributes:
        id: name or path that it was loaded by.
        revision: commit on the Hub, if known.
        fingerprint: its configuration and shapes; see ``model_fingerprint``.
        tokenizer_hash: SHA-256 of its vocabulary.
        template_hash: SHA-256 of its chat template.
    """

    __pydantic_config__: ClassVar[Any] = _STRICT
    id: str
    revision: str | None
    fingerprint: dict[str, str | int | float | bool | None]
    tokenizer_hash: str
    template_hash: str


@dataclass(frozen=True)
class EditRecord:
    """Everything in ``edit.json``.

    Attributes:
        settings: how the edit edits.
        layers: by layer index, what was learnt there.
        model: the base model.
        fit: the settings of the fit, as a dictionary.
        demonstrations_hash: SHA-256 of the demonstrations.
        demonstrations_count: how many there were.
        versions: of sealign, torch, transformers and Python.
        tensors_hash: SHA-256 of the tensors; empty until saved.
        format, format_version: of the file.
    """

    __pydantic_config__: ClassVar[Any] = _STRICT
    settings: EditSettings
    layers: dict[str, LayerRecord]
    model: ModelRecord
    fit: dict[str, Any]
    demonstrations_hash: str
    demonstrations_count: int
    versions: dict[str, str]
    tensors_hash: str = ""
    format: str = FORMAT
    format_version: int = FORMAT_VERSION


@functools.cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(EditRecord)


def dump_record(record: EditRecord) -> str:
    """Return a record as JSON text."""
    return json.dumps(_adapter().dump_python(record, mode="json"), indent=2, allow_nan=False) + "\n"


def parse_record(text: str, place: str) -> EditRecord:
    """Return the record that a JSON text holds.

    Args:
        text: the contents of ``edit.json``.
        place: the file's name, for messages.

    Raises:
        EditFileError: not JSON, of another or a newer format, or a key is missing, unknown, of the wrong type
            or not finite.
    """
    from pydantic import ValidationError

    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise EditFileError(
            f"'{place}' is not JSON ({error.msg} at line {error.lineno}); it is truncated or corrupted, "
            "copy or download it again"
        ) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise EditFileError(f"'{place}' is not an edit: its 'format' is not '{FORMAT}'; check the path")
    version = data.get("format_version")
    if isinstance(version, int) and not 1 <= version <= FORMAT_VERSION:
        raise EditFileError(
            f"'{place}' has format version {version}, but this Sealign reads 1 to {FORMAT_VERSION}; upgrade sealign"
        )
    # In a file, also what has a default must be there.
    missing = [field.name for field in dataclasses.fields(EditRecord) if field.name not in data]
    if missing:
        raise _invalid(place, missing[0], "missing")
    try:
        record: EditRecord = _adapter().validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise _invalid(place, ".".join(str(part) for part in first["loc"]), first["msg"].lower()) from error
    return record


def _invalid(place: str, where: str, reason: str) -> EditFileError:
    return EditFileError(
        f"'{place}' is not valid at '{where}': {reason}; it was changed by hand or by another program, copy or "
        "download it again"
    )


def model_record(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> ModelRecord:
    """Return the record of a model and its tokenizer."""
    base: Any = unwrap_model(model)
    return ModelRecord(
        id=getattr(base, "name_or_path", "") or type(base).__name__,
        revision=getattr(base.config, "_commit_hash", None),
        fingerprint=model_fingerprint(model),
        tokenizer_hash=tokenizer_hash(tokenizer),
        template_hash=template_hash(tokenizer),
    )
