"""Measures of open-ended answers: functions of prompt and answer, and built-in scorers."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sealign.demonstrations.prompts import Prompt
from sealign.errors import MeasureError, SettingError, unknown_name

REPEATED = 4
"""Length of the token sequences that ``repetition`` counts (Welleck et al. 2020, arXiv 1908.04319: seq-rep-4)."""

LOSS, REPETITION, JUDGED = "loss", "repetition", "judge_preference"
"""Metrics that are computed without a measure that the user names."""

ALWAYS = (LOSS, REPETITION)
"""Metrics of every answer, which may be given an aim."""

RESERVED = (LOSS, JUDGED)
"""Names that no measure may have."""

_REFUSAL = re.compile(
    r"\b(?:(?:i'm|i am) (?:sorry|unable|not able|afraid)|i (?:can't|cannot|can not|won't|will not|must decline)"
    r"|as an ai\b)",
    re.IGNORECASE,
)
_DISTINCT = re.compile(r"distinct-([1-9])")
_REGEX = "regex:"


@dataclass(frozen=True)
class ArmAnswer:
    """The answer of one arm to a prompt.

    Attributes:
        arm: Name of the arm.
        prompt: The prompt.
        text: Text of the answer.
        ids: Token ids of the answer, without an end token.
    """

    arm: str
    prompt: Prompt
    text: str
    ids: tuple[int, ...]


@runtime_checkable
class AnswerMeasure(Protocol):
    """A measure that gives each answer a number."""

    @property
    def name(self) -> str:
        """Name of the metric in results; without a slash, which separates subgroups."""

    @property
    def identity(self) -> str:
        """Text that changes whenever the measure may give other numbers, such as the hash of a classifier's weights."""

    def score(self, answers: Sequence[ArmAnswer]) -> list[float]:
        """Return a finite number for each answer.

        Args:
            answers: The answers.

        Raises:
            MeasureError: The measure fails for an answer, or its value is not a finite number.
        """


@dataclass(frozen=True)
class Scorer:
    """A function of an answer as a measure.

    Attributes:
        name: Name of the metric.
        function: Function that returns the score of an answer.
        identity: Text that changes with the function.
    """

    name: str
    function: Callable[[ArmAnswer], Any]
    identity: str

    def score(self, answers: Sequence[ArmAnswer]) -> list[float]:
        """Return the score of each answer; see ``AnswerMeasure``."""
        return [self._score(answer) for answer in answers]

    def _score(self, answer: ArmAnswer) -> float:
        what = f"scorer '{self.name}', for the answer of '{answer.arm}' to {answer.prompt.text!r:.80}"
        try:
            value = self.function(answer)
        except Exception as error:
            raise MeasureError(
                f"{what}, raised {type(error).__name__} ({error}); correct it, and run the same command again to "
                "continue"
            ) from error
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number) or isinstance(value, str):
            raise MeasureError(f"{what}, returned {value!r}, but it must return a finite number; correct it")
        return number


def load_scorer(text: str) -> Scorer:
    """Return the scorer that a text describes.

    Args:
        text: ``tokens``, the number of tokens; ``distinct-N``, the share of different ones among all sequences of N
            tokens (Li et al. 2016, arXiv 1510.03055), 1 if there are none; ``repetition``, 1 minus distinct-4;
            ``refusal``, 1 if an English answer begins or goes on with a phrase of refusal, else 0; ``regex:PATTERN``, 1
            if the pattern occurs in the answer, else 0; or ``module:function``, a Python function of the texts of
            prompt and answer. ``NAME=`` before it names the metric.

    Raises:
        SettingError: The name is unknown, the pattern is no regular expression, or there is no such function.

    Example:
        >>> answer = ArmAnswer("base", Prompt("Why?"), "I cannot say.", (4, 8, 4))
        >>> [load_scorer(name).score([answer]) for name in ("tokens", "refusal", "distinct-1", "has I=regex:I")]
        [[3.0], [1.0], [0.6666666666666666], [1.0]]
    """
    name, source = split_name(text)
    if source.startswith(_REGEX):
        return _pattern_scorer(name or "regex", source.removeprefix(_REGEX))
    if match := _DISTINCT.fullmatch(source):
        n = int(match[1])
        return Scorer(name or source, lambda answer: distinct_share(answer.ids, n), source)
    if source in BUILT_IN:
        return Scorer(name or source, BUILT_IN[source], source)
    if ":" in source:
        return _function_scorer(name, source)
    known = [*BUILT_IN, "distinct-2", f"{_REGEX}PATTERN", "module:function"]
    raise SettingError(unknown_name("scorer", source, known))


def distinct_share(ids: Sequence[int], n: int) -> float:
    """Return the share of different sequences among all sequences of n consecutive tokens; 1 if there are none.

    Args:
        ids: Token ids.
        n: Length of the sequences. Must be at least 1.

    Example:
        >>> distinct_share([1, 2, 1, 2, 1], 2)
        0.5
    """
    found = list(zip(*(ids[start:] for start in range(n)), strict=False))
    return len(set(found)) / len(found) if found else 1.0


def repetition(answer: ArmAnswer) -> float:
    """Return the share of sequences of 4 tokens that occurred before in the answer (seq-rep-4)."""
    return 1.0 - distinct_share(answer.ids, REPEATED)


BUILT_IN: dict[str, Callable[[ArmAnswer], float]] = {
    "tokens": lambda answer: float(len(answer.ids)),
    REPETITION: repetition,
    "refusal": lambda answer: float(_REFUSAL.search(answer.text.replace("\u2019", "'")) is not None),
}
"""Built-in scorers by name, beside ``distinct-N`` and ``regex:PATTERN``."""


def split_name(text: str) -> tuple[str | None, str]:
    """Return the name before an equals sign, or None, and the rest.

    Raises:
        SettingError: The name is blank.

    Example:
        >>> split_name("thanks=regex:a=b"), split_name("regex:a=b")
        (('thanks', 'regex:a=b'), (None, 'regex:a=b'))
    """
    match = re.fullmatch(r"([\w .-]+)=(.+)", text, re.DOTALL)
    return (checked_name(match[1].strip()), match[2]) if match else (None, text)


def checked_name(name: str) -> str:
    """Return a name of a measure, or raise an error if it is blank or has a slash, which separates subgroups.

    Raises:
        SettingError: The name is blank or has a slash.
    """
    if not name.strip() or "/" in name:
        raise SettingError(
            f"the measure has the name '{name}', but it must have a name without a slash; choose another"
        )
    return name


def _pattern_scorer(name: str, pattern: str) -> Scorer:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise SettingError(f"scorer '{_REGEX}{pattern}' is no regular expression ({error}); correct it") from error
    if not pattern:
        raise SettingError(f"scorer '{_REGEX}' has no pattern; give one, such as {_REGEX}thank")
    return Scorer(name, lambda answer: float(compiled.search(answer.text) is not None), f"{_REGEX}{pattern}")


def _function_scorer(name: str | None, source: str) -> Scorer:
    """Return the scorer of a function, whose identity has the hash of the file that defines it."""
    place, _, attribute = source.partition(":")
    try:
        function: Any = importlib.import_module(place)
        for part in attribute.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingError(f"scorer '{source}' cannot be imported ({error}); give it as module:function") from error
    if not callable(function):
        raise SettingError(f"scorer '{source}' is of type {type(function).__name__}, but it must be a function")
    try:
        defined = Path(inspect.getfile(inspect.unwrap(function))).read_bytes()
    except (TypeError, OSError):  # built into Python
        defined = b""
    digest = hashlib.sha256(defined).hexdigest()[:16]
    return Scorer(name or attribute, lambda answer: function(answer.prompt.text, answer.text), f"{source} {digest}")
