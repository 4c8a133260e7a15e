"""Results of an evaluation, item by item: the contents of ``results.json``, written atomically and read strictly."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from sealign.edits.record import ModelRecord
from sealign.errors import ResultsFileError
from sealign.evaluation.damage import Damage
from sealign.evaluation.item_scores import ItemScores
from sealign.files import write_bytes
from sealign.record_files import RECORD_CONFIG, read_record, write_record

FORMAT = "sealign.results"
FORMAT_VERSION = 3

RESULTS_NAME = "results.json"
"""File name of the results."""

BASE = "base"
"""Name of the arm of the base model."""

ANSWERS = "answers"
"""Name of the task of open-ended prompts."""

ArmKind = Literal["base", "edit", "random", "reversed"]


def finite_or_none(values: NDArray[np.float64]) -> list[float | None]:
    """Return numbers as a list that JSON can hold, with None for those that are NaN or infinite."""
    return [float(value) if np.isfinite(value) else None for value in values]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A model that was evaluated: the base model, an edited model, or a control of an edit.

    Attributes:
        kind: ``base``, ``edit``, ``random`` (the edit in random directions) or ``reversed`` (the edit in
            the opposite direction).
        edit: Name of the edit that the arm is or controls; None for the base model.
        source: Folder or repository of the edit; None for controls and for edits that were not loaded from one.
        method: Method of the edit; the names of several methods are joined by a plus.
        config: Settings that the edit was fitted with; of several methods together, by the name of the method.
        strength: Strength at which the edit was applied; None if the method has no strength.
        layers: Indices of the edited layers, in ascending order.
        hash: SHA-256 of the edit as it was applied.
        sweep: Name of the edit whose strength is varied over several arms; None outside a sweep.
        seed: Seed of the random directions.
        fit_seconds: Duration of the fit in seconds; None for controls.
        seconds: Duration of each task in seconds, in the run that finished it.
    """

    __pydantic_config__: ClassVar[Any] = RECORD_CONFIG
    kind: ArmKind
    edit: str | None = None
    source: str | None = None
    method: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    strength: float | None = None
    layers: list[int] = field(default_factory=list)
    hash: str | None = None
    sweep: str | None = None
    seed: int | None = None
    fit_seconds: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """Scores of one metric in one arm.

    Attributes:
        numerators: Score of each item, or numerator of a ratio; None if it is NaN or infinite.
        denominators: Denominator of each item if the metric is a ratio, else None.
    """

    __pydantic_config__: ClassVar[Any] = RECORD_CONFIG
    numerators: list[float | None]
    denominators: list[float] | None

    @classmethod
    def of(cls, scores: ItemScores) -> Scores:
        """Return the record of the scores of an arm."""
        below = None if scores.denominators is None else scores.denominators.tolist()
        return cls(finite_or_none(scores.numerators), below)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric over the items of a task, in every arm; see ``ItemScores``.

    Attributes:
        items: Positions among the items of the task.
        aim: Which values are good: ``higher``, ``lower``, a target value, or None.
        scale: Factor of a ratio.
        offset: Constant that is added to a scaled ratio.
        headline: Whether verdicts depend on the metric.
        arms: Scores by name of the arm.
    """

    __pydantic_config__: ClassVar[Any] = RECORD_CONFIG
    items: list[int]
    aim: Literal["higher", "lower"] | float | None
    scale: float
    offset: float
    headline: bool
    arms: dict[str, Scores] = field(default_factory=dict)

    def value(self, arm: str) -> float:
        """Return the metric of one arm; NaN if the denominators of a ratio sum to 0."""
        return self.item_scores(arm).value

    def item_scores(self, arm: str) -> ItemScores:
        """Return the scores of one arm."""
        scores = self.arms[arm]
        below = None if scores.denominators is None else np.array(scores.denominators)
        above = np.array(scores.numerators, dtype=np.float64)  # None becomes NaN
        return ItemScores(np.array(self.items), above, below, self.aim, self.scale, self.offset)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task: its items, with the scores and answers of every arm.

    Attributes:
        version: Version of the task in lm-evaluation-harness.
        questions: Text of each item, for readers.
        groups: Label of each item; items of one label are resampled together. None if all items are independent.
        metrics: Mapping from name to metric; the name of a subgroup is ``metric/subgroup``.
        answers: Mapping from arm to the answer to each item: the most probable choice, or the generated text.
        notes: Remarks for the reader, such as a metric that was not computed.
    """

    __pydantic_config__: ClassVar[Any] = RECORD_CONFIG
    version: str
    questions: list[str]
    groups: list[str] | None
    metrics: dict[str, Metric] = field(default_factory=dict)
    answers: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add_scores(self, metric: str, arm: str, values: ItemScores, *, headline: bool) -> None:
        """Add one metric of one arm.

        Args:
            metric: Name of the metric.
            arm: Name of the arm.
            values: Scores of the items.
            headline: Whether verdicts depend on the metric.
        """
        if metric not in self.metrics:
            self.metrics[metric] = Metric(
                items=values.items.tolist(),
                aim=values.aim,
                scale=values.scale,
                offset=values.offset,
                headline=headline,
            )
        self.metrics[metric].arms[arm] = Scores.of(values)


@dataclass(frozen=True)
class DamageRecord:
    """Damage of one arm, text by text; see ``Damage``. None stands for NaN and infinity."""

    __pydantic_config__: ClassVar[Any] = RECORD_CONFIG
    tokens: list[float]
    base: list[float | None]
    edited: list[float | None]
    divergence: list[float | None]

    @classmethod
    def of(cls, damage: Damage) -> DamageRecord:
        """Return the record of a damage."""
        columns = (damage.base, damage.edited, damage.divergence)
        return cls(damage.tokens.tolist(), *(finite_or_none(column) for column in columns))

    @property
    def damage(self) -> Damage:
        """The damage as arrays."""
        columns = (self.tokens, self.base, self.edited, self.divergence)
        return Damage(*(np.array(column, dtype=np.float64) for column in columns))


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything in ``results.json``.

    Attributes:
        command: Command line that computes the results again.
        settings: Settings of the evaluation.
        model: The base model.
        versions: Versions of the libraries.
        arms: Mapping from name to arm; ``base`` is the base model.
        tasks: Mapping from name to the results of the task.
        damage: Mapping from arm to its damage on neutral text, for all arms except the base model.
        domain_damage: The same on the base model's own answers to held-out demonstrations and to open-ended
            prompts; empty without them.
        format, format_version: Format of the file.
    """

    __pydantic_config__: ClassVar[Any] = RECORD_CONFIG
    command: str
    settings: dict[str, Any]
    model: ModelRecord
    versions: dict[str, str]
    arms: dict[str, Arm]
    tasks: dict[str, Task]
    damage: dict[str, DamageRecord]
    domain_damage: dict[str, DamageRecord] = field(default_factory=dict)
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    @property
    def edits(self) -> list[str]:
        """Names of the edits."""
        return [name for name, arm in self.arms.items() if arm.kind == "edit"]

    def controls(self, edit: str, kind: ArmKind) -> list[str]:
        """Return the names of the controls of an edit.

        Args:
            edit: Name of the edit.
            kind: ``random`` or ``reversed``.
        """
        return [name for name, arm in self.arms.items() if arm.edit == edit and arm.kind == kind]

    def save(self, folder: str | Path) -> Path:
        """Write ``results.json`` to a folder atomically, and return its path.

        Args:
            folder: Folder to write to.
        """
        path = Path(folder) / RESULTS_NAME
        write_bytes(path, write_record(self, indent=None).encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read ``results.json``.

        Args:
            path: The file, or its folder.

        Raises:
            ResultsFileError: The file is missing, is not JSON, has another format or version, or a key is missing,
                unknown or of the wrong type.
        """
        file = Path(path) / RESULTS_NAME if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ResultsFileError(f"there are no results at '{path}'; give the folder or file of sealign evaluate")
        return read_record(
            file,
            cls,
            format=FORMAT,
            format_version=FORMAT_VERSION,
            error=ResultsFileError,
            remake="run the evaluation again with this version",
        )
