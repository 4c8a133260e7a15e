"""What an evaluation found, item by item: the contents of ``results.json``, written whole and read strictly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from sealign.edits.record import EditSettings, ModelRecord
from sealign.errors import ResultsFileError
from sealign.evaluation.damage import Damage
from sealign.evaluation.item_scores import ItemScores
from sealign.files import RECORD_CONFIG, read_record, write_bytes, write_record

FORMAT = "sealign.results"
FORMAT_VERSION = 1
RESULTS_NAME = "results.json"
BASE = "base"

ArmKind = Literal["base", "edit", "random", "reversed"]


@dataclass(frozen=True)
class Arm:
    """One model that was evaluated.

    Attributes:
        kind: ``base``, ``edit``, or a control of an edit: ``random`` directions or ``reversed`` roles.
        of: the edit that it is or controls; None for the base model.
        source: folder or repository of the edit; None for all others.
        hash: of the edit that was on the model.
        seed: of the random directions.
        settings: that the edit was applied with; None for the base model and for other methods.
        layers: that were edited; empty likewise.
        method: the names of its parts, joined by a plus, where it is not a spectral edit.
        fit_seconds: that a method took to fit; None where that was not measured.
        seconds: by task, the time it took in the run that finished it.
    """

    __pydantic_config__: ClassVar[Any] = RECORD_CONFIG
    kind: ArmKind
    of: str | None
    source: str | None
    hash: str | None
    seed: int | None
    settings: EditSettings | None
    layers: list[int]
    seconds: dict[str, float]
    method: str | None = None
    fit_seconds: float | None = None


@dataclass(frozen=True)
class Scores:
    """One metric of one arm: a numerator an item, and a denominator where it is a ratio."""

    __pydantic_config__: ClassVar[Any] = RECORD_CONFIG
    numerators: list[float]
    denominators: list[float] | None


@dataclass(frozen=True)
class Metric:
    """One metric over the items of a task, in every arm; see ``ItemScores``.

    Attributes:
        items: positions in the task's items.
        aim: which way is good.
        scale, offset: of a ratio.
        headline: whether it stands for the task in verdicts.
        arms: by name.
    """

    __pydantic_config__: ClassVar[Any] = RECORD_CONFIG
    items: list[int]
    aim: Literal["higher", "lower"] | float | None
    scale: float
    offset: float
    headline: bool
    arms: dict[str, Scores]

    def value(self, arm: str) -> float:
        """Return the metric of one arm; NaN where a ratio has no denominator."""
        return self.item_scores(arm).value

    def item_scores(self, arm: str) -> ItemScores:
        """Return the scores of one arm."""
        scores = self.arms[arm]
        below = None if scores.denominators is None else np.array(scores.denominators)
        return ItemScores(np.array(self.items), np.array(scores.numerators), below, self.aim, self.scale, self.offset)


@dataclass(frozen=True)
class Task:
    """One task: its items, and what every arm made of them.

    Attributes:
        version: of the task, in the harness.
        questions: of each item, for people.
        groups: of each item, a label for what is resampled together; None if every item stands alone.
        metrics: by name; subgroups are ``metric/subgroup``.
        answers: by arm, the answer to each item: the most probable choice, or what was generated.
        notes: what a reader must know, such as a metric that was not computed.
    """

    __pydantic_config__: ClassVar[Any] = RECORD_CONFIG
    version: str
    questions: list[str]
    groups: list[str] | None
    metrics: dict[str, Metric]
    answers: dict[str, list[str]]
    notes: list[str]


@dataclass(frozen=True)
class DamageRecord:
    """The damage of one arm, text by text; see ``Damage``."""

    __pydantic_config__: ClassVar[Any] = RECORD_CONFIG
    tokens: list[float]
    base: list[float]
    edited: list[float]
    divergence: list[float]

    @classmethod
    def of(cls, damage: Damage) -> DamageRecord:
        """Return the record of a damage."""
        return cls(*(column.tolist() for column in (damage.tokens, damage.base, damage.edited, damage.divergence)))

    @property
    def damage(self) -> Damage:
        """The damage."""
        return Damage(*(np.array(column) for column in (self.tokens, self.base, self.edited, self.divergence)))


@dataclass(frozen=True)
class Results:
    """Everything in ``results.json``.

    Attributes:
        command: that makes it again.
        settings: of the evaluation.
        model: the base model.
        versions: of what it was made with.
        arms: by name; ``base`` is the unedited model.
        tasks: by name.
        damage: by arm, of all but the base.
        format, format_version: of the file.
    """

    __pydantic_config__: ClassVar[Any] = RECORD_CONFIG
    command: str
    settings: dict[str, Any]
    model: ModelRecord
    versions: dict[str, str]
    arms: dict[str, Arm]
    tasks: dict[str, Task]
    damage: dict[str, DamageRecord]
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    @property
    def edits(self) -> list[str]:
        """Names of the edits."""
        return [name for name, arm in self.arms.items() if arm.kind == "edit"]

    def controls(self, edit: str, kind: ArmKind) -> list[str]:
        """Return the names of an edit's controls of one kind."""
        return [name for name, arm in self.arms.items() if arm.of == edit and arm.kind == kind]

    def save(self, folder: str | Path) -> Path:
        """Write ``results.json`` to a folder, whole or not at all, and return its path."""
        path = Path(folder) / RESULTS_NAME
        write_bytes(path, write_record(self, indent=None).encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read ``results.json``, or the one in a folder.

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
