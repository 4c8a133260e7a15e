"""A text classifier of transformers as a measure of answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sealign.errors import MeasureError, SettingError, unknown_name
from sealign.evaluation.answer_measures import ArmAnswer, checked_name, split_name
from sealign.hub import hub_access
from sealign.models.weights import weights_digest

if TYPE_CHECKING:
    from transformers import TextClassificationPipeline


class Classifier:
    """The probability of a label by a text-classification model of transformers, for the answer alone.

    Args:
        model: Folder or Hub id of the model.
        label: Label whose probability is the score. None takes the only label of a model with a single one.
        name: Name of the metric. Default: the label.
        device: Device of the model.

    Raises:
        SettingError: The model cannot be loaded, or has no such label, or several and none is named.
    """

    def __init__(self, model: str, label: str | None = None, *, name: str | None = None, device: str = "cpu") -> None:
        self._pipeline = _load_classifier(model, device)
        known = [str(each) for each in (self._pipeline.model.config.id2label or {}).values()]
        if label is None and len(known) != 1:
            raise SettingError(
                f"the classifier '{model}' has the labels {', '.join(known)}; name one, as in {model}:{known[-1]}"
            )
        if label is not None and label not in known:
            raise SettingError(unknown_name(f"label of the classifier '{model}'", label, known))
        self._label = known[0] if label is None else label
        self._name = checked_name(name or self._label.replace("/", " "))
        self._longest = _longest(self._pipeline)
        digest = weights_digest(self._pipeline.model).hex()[:16]
        self._identity = f"classifier {model}:{self._label} {digest}"

    @property
    def name(self) -> str:
        """Name of the metric."""
        return self._name

    @property
    def identity(self) -> str:
        """Model, label and digest of the weights."""
        return self._identity

    def score(self, answers: Sequence[ArmAnswer]) -> list[float]:
        """Return the probability of the label for each answer; see ``AnswerMeasure``."""
        rows: Any = self._pipeline(
            [answer.text for answer in answers], top_k=None, truncation=True, max_length=self._longest
        )
        scores = [next(float(each["score"]) for each in row if each["label"] == self._label) for row in rows]
        for answer, score in zip(answers, scores, strict=True):
            if not math.isfinite(score):
                raise MeasureError(
                    f"classifier '{self.name}', for the answer of '{answer.arm}' to {answer.prompt.text!r:.80}, gave "
                    f"{score}; use another classifier"
                )
        return scores


def _load_classifier(model: str, device: str) -> TextClassificationPipeline:
    from transformers import pipeline

    try:
        with hub_access(Path(model) if Path(model).is_dir() else model):
            found: Any = pipeline("text-classification", model=model, device=device)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise SettingError(
            f"cannot load the classifier '{model}' ({type(error).__name__}: {str(error).splitlines()[0]:.200}); give "
            "the folder or the Hub id of a text-classification model"
        ) from error
    return found  # type: ignore[no-any-return]


def _longest(pipeline: TextClassificationPipeline) -> int | None:
    """Return the number of tokens that a classifier reads, or None if there is no limit."""
    limit: int | None = getattr(pipeline.model.config, "max_position_embeddings", None)
    tokens: int | None = getattr(pipeline.tokenizer, "model_max_length", None)
    # Some tokenizers do not know the limit; RoBERTa keeps two positions for itself.
    return tokens if limit is None or (tokens is not None and tokens <= limit) else limit - 2


def load_classifier(text: str, *, device: str = "cpu") -> Classifier:
    """Return the classifier that a text such as ``NAME=MODEL:LABEL`` describes; NAME and LABEL may be left out.

    Args:
        text: The description.
        device: Device of the model.

    Raises:
        SettingError: As for ``Classifier``.
    """
    name, source = split_name(text)
    model, separator, label = (source, "", "") if Path(source).is_dir() else source.rpartition(":")
    return (
        Classifier(model, label, name=name, device=device)
        if separator
        else Classifier(source, name=name, device=device)
    )
