"""What an evaluation found, item by item: the contents of ``results.json``, written whole and read strictly."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from sealign.edits.record import EditSettings, ModelRecord
from sealign.errors import ResultsFileError
from sealign.evaluation.damage import Damage
from sealign.evaluation.item_scores import ItemScores
from sealign.files import write_bytes

FORMAT = "sealign.results"
FORMAT_VERSION = 1
RESULTS_NAME = "results.json"
BASE = "base"

_STRICT: Any = {"extra": "forbid", "strict": True, "allow_inf_nan": False}

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

    __pydantic_config__: ClassVar[Any] = _STRICT
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

    __pydantic_config__: ClassVar[Any] = _STRICT
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

    __pydantic_config__: ClassVar[Any] = _STRICT
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

    __pydantic_config__: ClassVar[Any] = _STRICT
    version: str
    questions: list[str]
    groups: list[str] | None
    metrics: dict[str, Metric]
    answers: dict[str, list[str]]
    notes: list[str]


@dataclass(frozen=True)
class DamageRecord:
    """The damage of one arm, text by text; see ``Damage``."""

    __pydantic_config__: ClassVar[Any] = _STRICT
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

    __pydantic_config__: ClassVar[Any] = _STRICT
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
        write_bytes(path, json.dumps(_adapter().dump_python(self, mode="json"), allow_nan=False).encode() + b"\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read ``results.json``, or the one in a folder.

        Raises:
            ResultsFileError: missing, not JSON, of another or a newer format, or not as it was written.
        """
        from pydantic import ValidationError

        file = Path(path) / RESULTS_NAME if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ResultsFileError(f"there are no results at '{path}'; give the folder or file of sealign evaluate")
        try:
            text = file.read_text(encoding="utf-8")
            data = json.loads(text)
        except ValueError as error:
            raise ResultsFileError(f"'{file}' is not JSON; run the evaluation again or copy the file again") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ResultsFileError(f"'{file}' is not a results file: its 'format' is not '{FORMAT}'; check the path")
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise ResultsFileError(
                f"'{file}' has format version {version}, but this Sealign reads {FORMAT_VERSION}; upgrade sealign"
            )
        try:
            results: Results = _adapter().validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ResultsFileError(
                f"'{file}' is not valid at '{where}': {first['msg'].lower()}; run the evaluation again"
            ) from error
        return results


@functools.cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Results)
