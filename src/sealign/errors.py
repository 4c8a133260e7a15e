"""Errors that Sealign raises on purpose, and helpers for the wording of their messages.

Catch ``SealignError`` for all of them, or the class of one kind of error. A message is one sentence that gives the
value, the bound and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SealignError(Exception):
    """Base class of all errors that Sealign raises on purpose."""


class SealignWarning(UserWarning):
    """A result may not be what is expected, though nothing is wrong by itself."""


class SettingError(SealignError, ValueError):
    """A setting is out of range, unknown, or contradicts another setting."""


class DemonstrationError(SealignError, ValueError):
    """Demonstrations are missing, malformed, too few, or unsuitable for the model."""


class ModelError(SealignError):
    """A model cannot be found, loaded, or used in its present state."""


class SiteError(SealignError, ValueError):
    """A site or layer cannot be found in a model."""


class ActivationError(SealignError, ValueError):
    """Activations have the wrong shape, or contain NaN or infinity."""


class DegenerateError(ActivationError):
    """The activations have no covariance to decompose, or fewer directions than the requested rank."""


class EditFileError(SealignError):
    """The folder of an edit is missing, truncated, corrupted, or of another format."""


class ResultsFileError(SealignError):
    """The results of an evaluation are missing, corrupted, of another format, or do not belong together."""


class JudgeError(SealignError):
    """A judge model cannot be reached, or its answer has the wrong form."""


class MeasureError(SealignError):
    """A measure of answers fails, or gives a value that is not a finite number."""


class ExportError(SealignError):
    """An edit cannot be exported in the requested form."""


class ServingError(SealignError):
    """A server cannot serve an edit, or a request names an edit that it may not use."""


class UnknownEditError(ServingError):
    """A server has no edit of the requested name."""


class FingerprintError(SealignError):
    """An edit was fitted on a different model from the one it is applied to."""


class NormalizationError(SealignError):
    """Per-feature rescaling is used where it is undefined: in batched or cached decoding."""


class WorkerError(SealignError):
    """The worker processes of a job cannot connect, or one of them has exited."""


def suggestion(unknown: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the nearest known name, or an empty string.

    Args:
        unknown: Name that was given.
        known: Names to compare it with.

    Example:
        >>> suggestion("tahn", ["tanh", "elu"])
        " (did you mean 'tanh'?)"
    """
    matches = difflib.get_close_matches(unknown, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


def unknown_name(kind: str, value: str, known: Iterable[str]) -> str:
    """Return the message for a name that is not one of the known names.

    Args:
        kind: Kind of thing that the name denotes, such as ``"feature map"``.
        value: Name that was given.
        known: Names to choose from.

    Example:
        >>> unknown_name("feature map", "tahn", ["elu", "tanh"])
        "unknown feature map 'tahn' (did you mean 'tanh'?); choose one of: elu, tanh"
    """
    names = list(known)
    return f"unknown {kind} '{value}'{suggestion(value, names)}; choose one of: {', '.join(names)}"


def check_choice(kind: str, value: str, known: Iterable[str]) -> None:
    """Raise an error if a setting is not one of its known values.

    Args:
        kind: Name of the setting, such as ``"combination"``.
        value: Value that was given.
        known: Values to choose from.

    Raises:
        SettingError: The value is unknown; the message suggests the nearest known value.
    """
    names = list(known)
    if value not in names:
        raise SettingError(unknown_name(kind, value, names))


def first_sentence(error: Exception) -> str:
    """Return the first sentence of the message of another library's error, on one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.partition(". ")[0].rstrip(".: ")[:300]
