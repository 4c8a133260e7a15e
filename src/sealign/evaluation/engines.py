"""Engines: where the model of an evaluation runs, in this process or on a server."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sealign.demonstrations.demonstration import Demonstration
from sealign.edits.edit import Edit
from sealign.edits.intervention import Intervention
from sealign.edits.record import ModelRecord, model_record
from sealign.errors import SettingError
from sealign.evaluation.damage import Damage, measure_passages
from sealign.evaluation.harness import SealignLM
from sealign.evaluation.journal import Journal
from sealign.evaluation.served_lm import ServedLM
from sealign.evaluation.served_model import ServedModel
from sealign.models.checkpoint_tensors import CheckpointTensors
from sealign.models.passages import OWN_ANSWER_TOKENS, Passage, answer_passages, distinct_prompts
from sealign.models.prompt_format import PromptFormat
from sealign.models.shared_layers import share_layers
from sealign.models.weights import stored_weights, weights_digest
from sealign.progress import Track

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Engine(Protocol):
    """Where the model of an evaluation runs. Statistics, verdicts and reports are the same for all."""

    @property
    def record(self) -> ModelRecord:
        """Record of the base model."""

    @property
    def identity(self) -> str:
        """What the scores of the base model depend on, for the keys of journals."""

    def check(self, edits: Sequence[Intervention]) -> None:
        """Raise SettingError if the engine cannot apply an edit."""

    def lm(self, edit: Intervention | None, **settings: Any) -> contextlib.AbstractContextManager[SealignLM]:
        """Return a context manager that yields the model with an edit, as a model of lm-evaluation-harness."""

    def shared(self, edits: Sequence[Intervention]) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the arms of an evaluation may share computations."""

    def own_answers(
        self, demonstrations: Sequence[Demonstration], prompt_format: PromptFormat, track: Track
    ) -> list[Passage]:
        """Return the base model's own answers to the prompts of demonstrations; see ``answer_passages``."""

    def damages(
        self, edits: Sequence[Intervention], passages: Sequence[Passage], journal: Journal, track: Track
    ) -> list[Damage]:
        """Return the damage of each edit on passages; see ``measure_passages``."""


class LocalEngine:
    """A model in this process.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        ignore_mismatch: Whether to accept a model with another fingerprint.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, ignore_mismatch: bool = False
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._ignore_mismatch = ignore_mismatch
        self.record = model_record(model, tokenizer)

    @property
    def identity(self) -> str:
        """Digest of every bit of the weights."""
        return weights_digest(self._model).hex()

    def check(self, edits: Sequence[Intervention]) -> None:
        """Accept every edit."""

    @contextlib.contextmanager
    def lm(self, edit: Intervention | None, **settings: Any) -> Iterator[SealignLM]:
        """Yield the model with an edit attached; see ``Engine``."""
        lm = SealignLM(
            self._model, edit=edit, tokenizer=self._tokenizer, ignore_mismatch=self._ignore_mismatch, **settings
        )
        try:
            yield lm
        finally:
            lm.close()

    def shared(self, edits: Sequence[Intervention]) -> contextlib.AbstractContextManager[None]:
        """Return a context in which layers before the edited ones run once for all arms."""
        return share_layers(self._model, [edit.modules for edit in edits])

    def own_answers(
        self, demonstrations: Sequence[Demonstration], prompt_format: PromptFormat, track: Track
    ) -> list[Passage]:
        """Return the base model's own answers; see ``Engine``."""
        return answer_passages(
            self._model,
            self._tokenizer,
            demonstrations,
            prompt_format=prompt_format,
            track=track,
        )

    def damages(
        self, edits: Sequence[Intervention], passages: Sequence[Passage], journal: Journal, track: Track
    ) -> list[Damage]:
        """Return the damage of each edit; see ``Engine``."""
        return measure_passages(
            self._model,
            self._tokenizer,
            edits,
            passages,
            journal=journal,
            ignore_mismatch=self._ignore_mismatch,
            track=track,
        )


class ServedEngine:
    """A model on a server of ``sealign serve``, where each arm is an edit that requests name.

    A server gives the log-probability of each token of a text, but not those of all others, so losses are measured and
    the KL divergence from the base model is not: it is NaN.

    Args:
        served: The server.
        skeleton: The model without weights, for its configuration.
        tokenizer: Its tokenizer.
        checkpoint: The tensors of its checkpoint, if they can be read, by which its weights are known; None otherwise.

    Attributes:
        skeleton: The model without weights.
        tokenizer: Its tokenizer.
    """

    def __init__(
        self,
        served: ServedModel,
        skeleton: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        checkpoint: CheckpointTensors | None = None,
    ) -> None:
        self._served = served
        self.skeleton = skeleton
        self.tokenizer = tokenizer
        weights = None if checkpoint is None else stored_weights(skeleton, checkpoint)
        found = model_record(skeleton, tokenizer)
        weights_hash, weights_type = weights or ("unknown", "unknown")
        self.record = dataclasses.replace(found, weights_hash=weights_hash, weights_type=weights_type)

    @property
    def identity(self) -> str:
        """Key of the server's URL, model and version, and of the weights where they are known."""
        return Journal.key(
            "served", self._served.url, self._served.name, self._served.version, self.record.weights_hash
        )

    def check(self, edits: Sequence[Intervention]) -> None:
        """Raise SettingError for what is no edit of activations, or needs whole sequences at once."""
        for edit in edits:
            if not isinstance(edit, Edit) or not edit.is_causal:
                raise SettingError(
                    f"a server cannot apply {edit.method} here; it takes single edits of activations that are not "
                    "rescaled per feature. Evaluate without --server"
                )

    @contextlib.contextmanager
    def lm(self, edit: Intervention | None, **settings: Any) -> Iterator[SealignLM]:
        """Yield the model with an edit, which the server has loaded meanwhile; see ``Engine``."""
        assert edit is None or isinstance(edit, Edit)
        with self._served.loaded(edit) as name:
            yield ServedLM(self._served, name, self.skeleton, tokenizer=self.tokenizer, **settings)

    def shared(self, edits: Sequence[Intervention]) -> contextlib.AbstractContextManager[None]:  # noqa: ARG002
        """Return a context that does nothing; a server reads every text whole."""
        return contextlib.nullcontext()

    def own_answers(
        self,
        demonstrations: Sequence[Demonstration],
        prompt_format: PromptFormat,
        track: Track,  # noqa: ARG002
    ) -> list[Passage]:
        """Return the base model's own answers; see ``Engine``."""
        prompts = distinct_prompts(self.tokenizer, demonstrations, prompt_format)
        with self.lm(None) as base:
            answers = base.answer(prompts, OWN_ANSWER_TOKENS) if prompts else []
            ends = set(base.end_tokens)
        own = [tuple(token for token in answer if token not in ends) for answer in answers]
        return [Passage(prompt + ids, len(prompt)) for prompt, ids in zip(prompts, own, strict=True) if ids]

    def damages(
        self, edits: Sequence[Intervention], passages: Sequence[Passage], journal: Journal, track: Track
    ) -> list[Damage]:
        """Return the damage of each edit, without divergences; see ``Engine``."""
        base = self._losses(None, passages, journal, track)
        tokens = np.array([float(passage.count) for passage in passages])
        unknown = np.full(len(passages), np.nan)
        return [Damage(tokens, base, self._losses(edit, passages, journal, track), unknown) for edit in edits]

    def _losses(self, edit: Intervention | None, passages: Sequence[Passage], journal: Journal, track: Track) -> Any:
        """Return the mean loss of each passage, in nats per token."""
        assert edit is None or isinstance(edit, Edit)
        edit_hash = None if edit is None else edit.hash
        keys = [Journal.key("loss", edit_hash, passage.ids, passage.start) for passage in passages]
        missing = [index for index, key in enumerate(keys) if key not in journal]
        if missing:
            with self._served.loaded(edit) as name:
                reading = self._served.read([passages[index].ids for index in missing], name)
                for number, read in track(reading, "Measuring damage", len(missing)):
                    index = missing[number]
                    journal.put({keys[index]: -float(read.log_probabilities[passages[index].start - 1 :].mean())})
        return np.array([float(journal.get(key)) for key in keys])


def served_engine(
    served: ServedModel, name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> ServedEngine:
    """Return the engine of a served model, whose configuration and tokenizer are read here, and no weights.

    Args:
        served: The server.
        name: Name or folder of the base model, as for ``load_model``.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Whether to run Python code that comes with the checkpoint.

    Raises:
        ModelError: The model is not found, is no causal language model, or has no tokenizer.
    """
    from sealign.errors import ModelError
    from sealign.models.loading import load_skeleton, open_checkpoint

    skeleton, tokenizer = load_skeleton(name, revision=revision, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise ModelError(f"'{name}' has no tokenizer, which an evaluation needs; give the folder of the whole model")
    skeleton.name_or_path = name
    local = Path(name).is_dir() or name == "smollm2"
    opened = open_checkpoint(name, revision=revision, trust_remote_code=trust_remote_code) if local else None
    return ServedEngine(served, skeleton, tokenizer, checkpoint=None if opened is None else opened[1])
