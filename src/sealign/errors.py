"""Every error a user can cause, under one base class.

The tree reads as documentation: catch ``SealignError`` for all of them, or the class that names what
went wrong. A message is one sentence with the value, the bound and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SealignError(Exception):
    """Base of all errors that Sealign raises on purpose."""


class SettingError(SealignError, ValueError):
    """A setting is outside its range, unknown, or contradicts another setting."""


class DemonstrationError(SealignError, ValueError):
    """Demonstrations are missing, malformed, too few, or do not fit the model."""


class ModelError(SealignError):
    """A model cannot be found, loaded, or used in the state it is in."""


class SiteError(SealignError, ValueError):
    """A site or layer cannot be resolved in a model."""


class ActivationError(SealignError, ValueError):
    """Activations have the wrong shape, or hold NaN or infinity."""


class DegenerateError(ActivationError):
    """The activations carry no covariance to decompose, or too little for the rank asked for."""


class EditFileError(SealignError):
    """The folder of an edit is missing, truncated, corrupted, or of another format."""


class ResultsFileError(SealignError):
    """The results of an evaluation are missing, corrupted, of another format, or do not belong together."""


class JudgeError(SealignError):
    """A judge model cannot be asked, or does not answer as it must."""


class ExportError(SealignError):
    """An edit cannot be carried into the form that is asked for."""


class ServingError(SealignError):
    """A server cannot take an edit, or a request cannot have it."""


class UnknownEditError(ServingError):
    """A server has no edit of this name."""


class FingerprintError(SealignError):
    """An edit was fitted on another model than the one it is applied to."""


class NormalizationError(SealignError):
    """Per-feature rescaling is used where it is not defined: batched or cached decoding."""


class WorkerError(SealignError):
    """The workers of a job cannot find, or have lost, each other."""


def suggestion(unknown: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the nearest known name, or an empty string.

    Example:
        >>> suggestion("tahn", ["tanh", "elu"])
        " (did you mean 'tanh'?)"
    """
    matches = difflib.get_close_matches(unknown, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


def unknown_name(kind: str, value: str, known: Iterable[str]) -> str:
    """Return the sentence for a name that is not one of the known ones.

    Example:
        >>> unknown_name("feature map", "tahn", ["elu", "tanh"])
        "unknown feature map 'tahn' (did you mean 'tanh'?); choose one of: elu, tanh"
    """
    names = list(known)
    return f"unknown {kind} '{value}'{suggestion(value, names)}; choose one of: {', '.join(names)}"


def first_sentence(error: Exception) -> str:
    """Return the first sentence of an error of another library, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.partition(". ")[0].rstrip(".: ")[:300]
