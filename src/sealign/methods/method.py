"""What every method has: it is fitted, put on a model and taken off, saved, loaded, and known by a hash."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor, nn

from sealign.demonstrations.demonstration import Demonstration, demonstrations_hash
from sealign.edits.record import ModelRecord, model_record
from sealign.errors import EditFileError, SettingError, unknown_name
from sealign.files import new_folder, read_tensors, tensors_hash, write_bytes, write_tensors
from sealign.models.fingerprint import check_fingerprint
from sealign.progress import Track, no_progress
from sealign.versions import library_versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = "sealign.method"
FORMAT_VERSION = 1
METHOD_NAME = "method.json"
METHOD_TENSORS = "method.safetensors"

_STRICT: Any = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


@dataclass(frozen=True)
class MethodRecord:
    """Everything in ``method.json``.

    Attributes:
        method: its name, such as ``iti``.
        settings: all of its settings, and what it learnt that is not a tensor.
        model: the base model.
        demonstrations_hash: SHA-256 of the demonstrations; None where it needs none.
        demonstrations_count: how many there were.
        fit_seconds: that the fit took.
        versions: of what it was made with.
        tensors_hash: SHA-256 of the tensors.
        format, format_version: of the file.
    """

    __pydantic_config__: ClassVar[Any] = _STRICT
    method: str
    settings: dict[str, Any]
    model: ModelRecord
    demonstrations_hash: str | None
    demonstrations_count: int
    fit_seconds: float
    versions: dict[str, str]
    tensors_hash: str
    format: str = FORMAT
    format_version: int = FORMAT_VERSION


class Attached:
    """A method that is on a model.

    Attributes:
        stack: what is undone when it is taken off.
        on_switch: called with what ``enabled`` becomes; hooks look at ``enabled`` themselves.
    """

    def __init__(self) -> None:
        self.stack = ExitStack()
        self.on_switch: Callable[[bool], None] | None = None
        self._enabled = True

    @property
    def enabled(self) -> bool:
        """Whether the method acts."""
        return self._enabled

    @contextmanager
    def switched(self, enabled: bool) -> Iterator[None]:
        """Switch the method on or off inside a ``with`` block."""
        before = self._enabled
        self.switch(enabled)
        try:
            yield
        finally:
            self.switch(before)

    def switch(self, enabled: bool) -> None:
        """Switch the method on or off."""
        self._enabled = enabled
        if self.on_switch is not None:
            self.on_switch(enabled)

    def detach(self) -> None:
        """Take the method off; the model is then what it was. A second call does nothing."""
        self._enabled = False
        self.stack.close()


@dataclass(frozen=True)
class FitContext:
    """What a method learns from.

    Attributes:
        model: the base model, which learning leaves as it is.
        tokenizer: its own.
        demonstrations: at least 2, or none where the method needs none.
        checkpoint_dir: where finished parts are kept; None for nowhere.
        track: shows progress.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    demonstrations: Sequence[Demonstration]
    checkpoint_dir: Path | None = None
    track: Track = no_progress


@dataclass(frozen=True, eq=False)
class Method(ABC):
    """A fitted method.

    Attributes:
        name: by which it is known.
        generates_only: whether it leaves the scores of given answers as they are.
        own_cache: whether it reads along with a second cache, so that it must see a text from its beginning.
        record: how it came to be.
        tensors: what it learnt, by name, on the CPU.
    """

    name: ClassVar[str]
    generates_only: ClassVar[bool] = False
    own_cache: ClassVar[bool] = False
    record: MethodRecord
    tensors: Mapping[str, Tensor]

    @classmethod
    def fit(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        demonstrations: Sequence[Demonstration],
        config: Any,
        *,
        checkpoint_dir: Path | None = None,
        track: Track = no_progress,
    ) -> Self:
        """Learn from demonstrations, and record how; see ``sealign.methods.registry.fit_method``."""
        started = time.perf_counter()
        used = tuple(demonstrations) if cls.needs_demonstrations(config) else ()
        settings, tensors = cls.learn(FitContext(model, tokenizer, used, checkpoint_dir, track), config)
        record = MethodRecord(
            method=cls.name,
            settings=settings_of(config) | settings,
            model=model_record(model, tokenizer),
            demonstrations_hash=demonstrations_hash(used) if used else None,
            demonstrations_count=len(used),
            fit_seconds=round(time.perf_counter() - started, 3),
            versions=library_versions(),
            tensors_hash=tensors_hash(tensors),
        )
        return cls(record, tensors)

    @classmethod
    def needs_demonstrations(cls, config: Any) -> bool:
        """Return whether the method learns from demonstrations with these settings."""
        return True

    @classmethod
    @abstractmethod
    def learn(cls, lesson: FitContext, config: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what is learnt: settings beside those of the configuration, and tensors by name."""

    @abstractmethod
    def put_on(self, model: Any, attached: Attached) -> None:
        """Change what a model computes, and leave on ``attached.stack`` what undoes it."""

    @property
    def settings(self) -> dict[str, Any]:
        """All of its settings."""
        return self.record.settings

    @property
    def prefix(self) -> str:
        """Text that is put before every prompt."""
        return ""

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of what decides its answers: name, settings, tensors and the shape of the base model."""
        parts = [self.name, self.settings, self.record.model.fingerprint, self.record.tensors_hash]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def randomized(self, seed: int) -> Method | None:
        """Return the method with random directions of the same lengths, or None where it has no directions."""
        return None

    def reversed(self) -> Method | None:
        """Return the method that acts the other way, or None where it has no way."""
        return None

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """Return the method with other tensors."""
        record = dataclasses.replace(self.record, tensors_hash=tensors_hash(tensors))
        return dataclasses.replace(self, record=record, tensors=tensors)

    def attach(self, model: PreTrainedModel | nn.Module, *, ignore_mismatch: bool = False) -> Attached:
        """Put the method on a model until the result is detached.

        Args:
            model: the base model.
            ignore_mismatch: attach to a model with another fingerprint.

        Raises:
            FingerprintError: the model is not the one that it was fitted on.
            SiteError, ModelError: the model lacks what the method acts on.
        """
        if not ignore_mismatch:
            check_fingerprint(model, self.record.model.fingerprint, self.record.model.id)
        attached = Attached()
        try:
            self.put_on(model, attached)
        except BaseException:
            attached.detach()
            raise
        return attached

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``method.json`` and ``method.safetensors`` to a folder, both or neither.

        Raises:
            EditFileError: the folder exists and is neither empty nor a method's.
        """
        with new_folder(Path(folder), replaces=METHOD_NAME) as temporary:
            write_bytes(temporary / METHOD_NAME, _dump(self.record))
            write_tensors(temporary / METHOD_TENSORS, self.tensors)


def settings_of(config: Any) -> dict[str, Any]:
    """Return the settings of a configuration as JSON has them."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(config).items()
    }


def read_method(folder: Path, classes: Mapping[str, type[Method]]) -> Method:
    """Read a method that ``save_pretrained`` wrote.

    Raises:
        EditFileError: a file is missing, changed, of another format or of a method that is not known.
    """
    from pydantic import ValidationError

    file = folder / METHOD_NAME
    try:
        record: MethodRecord = _adapter().validate_json(file.read_text(encoding="utf-8", errors="replace"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the top"
        raise EditFileError(
            f"'{file}' is not a method's record at '{where}': {first['msg'].lower()}; copy it again"
        ) from error
    if record.format != FORMAT or record.format_version != FORMAT_VERSION:
        raise EditFileError(
            f"'{file}' has format {record.format} {record.format_version}, but this Sealign reads {FORMAT} "
            f"{FORMAT_VERSION}; upgrade sealign"
        )
    if record.method not in classes:
        raise EditFileError(f"'{file}': {unknown_name('method', record.method, classes)}")
    tensors = read_tensors(folder / METHOD_TENSORS)
    if tensors_hash(tensors) != record.tensors_hash:
        raise EditFileError(f"the tensors of '{folder}' do not match their hash in {METHOD_NAME}; copy it again")
    return classes[record.method](record, tensors)


def check_at_least(name: str, value: float, bound: float) -> None:
    """Raise where a setting is below its bound.

    Raises:
        SettingError: names setting, value and bound.
    """
    if not value >= bound:
        raise SettingError(f"{name} is {value}, but it must be at least {bound:g}")


def _dump(record: MethodRecord) -> bytes:
    return json.dumps(_adapter().dump_python(record, mode="json"), indent=2, allow_nan=False).encode() + b"\n"


@functools.cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(MethodRecord)
