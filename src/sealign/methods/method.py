"""Method: a way to make an intervention from demonstrations."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from sealign.configuration import Config
from sealign.demonstrations.demonstration import Demonstration, demonstrations_hash
from sealign.demonstrations.splits import Holdout
from sealign.edits.edit import Edit
from sealign.edits.intervention import Intervention
from sealign.edits.record import EditRecord, model_record
from sealign.files import tensors_hash
from sealign.fitting.activation_store import Keep
from sealign.fitting.activations import Activations
from sealign.fitting.collect_config import CollectConfig
from sealign.models.weights import weights_digest
from sealign.progress import Track, no_progress
from sealign.versions import library_versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class FitContext:
    """Inputs of a fit, except for the configuration of the method.

    Attributes:
        model: The base model, which is not changed by fitting.
        tokenizer: Tokenizer of the model.
        demonstrations: Demonstrations to fit on; at least 2 for methods that use them.
        holdout: The part of the demonstrations that was left out before; None if none was.
        checkpoint_dir: Folder for finished parts of all fits; None to save none.
        keep: How activations are stored; None chooses the smaller representation.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.
        started: Time at which the fit started, on the clock of ``time.perf_counter``.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    demonstrations: Sequence[Demonstration]
    holdout: Holdout | None = None
    checkpoint_dir: Path | None = None
    keep: Keep | None = None
    track: Track = no_progress
    started: float = field(default_factory=time.perf_counter)

    def training_dir(self, method: str, config: Config) -> Path | None:
        """Return the folder of the checkpoints of a training, or None if none are kept.

        Everything that the training depends on decides the folder's name, so that a run continues from its own
        checkpoints only.

        Args:
            method: Name of the method.
            config: Settings of the method.
        """
        if self.checkpoint_dir is None:
            return None
        key = hashlib.sha256(weights_digest(self.model))
        key.update(f"{method} {demonstrations_hash(self.demonstrations)} {config!r}".encode())
        return self.checkpoint_dir / key.hexdigest()[:24]

    def record(self, method: str, config: Config, **parts: Any) -> EditRecord:
        """Return the record of an intervention that was fitted in this context.

        Args:
            method: Name of the method.
            config: Settings of the method.
            **parts: Further fields of ``EditRecord``.
        """
        used = self.demonstrations
        given = {"learned": {}, "tensors_hash": tensors_hash({})} | parts
        settings = config.dump()
        example = None
        if isinstance(config, CollectConfig):  # resolved, so that activations can be collected again in the same way
            prompt_format = config.prompt_format.resolve(self.tokenizer)
            settings["prompt_format"] = dataclasses.asdict(prompt_format)
            first = used[0]
            ids = prompt_format.encode(self.tokenizer, first.prompt, first.positive, history=first.history)
            example = str(self.tokenizer.decode(ids))
        return EditRecord(
            method=method,
            config=settings,
            model=model_record(self.model, self.tokenizer),
            demonstrations_hash=demonstrations_hash(used) if used else None,
            fitted_on=[item.hash for item in used],
            holdout=self.holdout,
            example=example,
            fit_seconds=round(time.perf_counter() - self.started, 3),
            versions=library_versions(),
            **given,
        )


@dataclass(frozen=True)
class Method:
    """A way to make an intervention from demonstrations.

    Attributes:
        name: Name of the method, such as ``sea``.
        config: Type of its configuration, which chooses the method.
        intervention: Type of the interventions that it makes.
        fit: Fits the method.
        fit_activations: Fits the method from activations that were collected before; None if it does not learn from
            the activations of one pass over the demonstrations.
        needs_demonstrations: Whether it learns from demonstrations with a configuration.
        packages: Import names of the optional packages that it needs, of the extra ``methods``.
    """

    name: str
    config: type[Config]
    intervention: type[Intervention]
    fit: Callable[[FitContext, Any], Intervention]
    fit_activations: Callable[[FitContext, Activations, Any], Edit] | None = None
    needs_demonstrations: Callable[[Any], bool] = lambda _: True
    packages: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class RecordedIntervention(Intervention):
    """An intervention that its record and named tensors describe in full; base of the methods that are not edits.

    Attributes:
        record: How it was made.
        weights: Mapping from name to fitted tensor, on the CPU.
    """

    record: EditRecord
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        context: FitContext,
        method: str,
        config: Config,
        *,
        learned: Mapping[str, Any] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        strength: float | None = None,
    ) -> Self:
        """Return the intervention with its record.

        Args:
            context: Inputs of the fit.
            method: Name of the method.
            config: Settings of the method.
            learned: Results of the fit that are not tensors.
            weights: Results of the fit that are tensors.
            strength: 1.0 if the method has a strength.
        """
        tensors = dict(weights or {})
        parts = {"learned": dict(learned or {}), "tensors_hash": tensors_hash(tensors), "strength": strength}
        record = context.record(method, config, **parts)
        return cls(record, tensors)

    @classmethod
    def from_record(
        cls,
        record: EditRecord,
        tensors: Mapping[str, Tensor],
        *,
        place: str = "edit",  # noqa: ARG003 - an argument of the base class, whose checks need it
    ) -> Self:
        """Build the intervention from its record and its tensors."""
        return cls(record, dict(tensors))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are saved, by name."""
        return dict(self.weights)


def without_demonstrations(context: FitContext) -> FitContext:
    """Return the context of a method that learns nothing from demonstrations."""
    return dataclasses.replace(context, demonstrations=(), holdout=None)
