"""Damage: what an edit costs a model on plain text that has nothing to do with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special

from sealign.edits.edit import Edit
from sealign.evaluation.journal import Journal
from sealign.methods.registry import Change, apply_change
from sealign.models.batching import pad_right, pad_token
from sealign.models.eval_mode import eval_mode
from sealign.models.structure import input_device
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Damage:
    """Losses of the base and the edited model on texts; means over all texts weigh by tokens.

    Attributes:
        tokens: predicted tokens of each text.
        base: mean loss of each text without the edit, in nats a token.
        edited: the same with the edit.
        divergence: mean KL(base || edited) of each text, in nats a token.
    """

    tokens: NDArray[np.float64]
    base: NDArray[np.float64]
    edited: NDArray[np.float64]
    divergence: NDArray[np.float64]

    @property
    def base_loss(self) -> float:
        """Mean loss of the base model over all tokens, in nats."""
        return float(np.average(self.base, weights=self.tokens))

    @property
    def edited_loss(self) -> float:
        """Mean loss of the edited model over all tokens, in nats."""
        return float(np.average(self.edited, weights=self.tokens))

    @property
    def loss_increase(self) -> float:
        """Edited less base mean loss, in nats a token; the log of the ratio of perplexities."""
        return self.edited_loss - self.base_loss

    @property
    def perplexity_ratio(self) -> float:
        """Edited over base perplexity, exp(loss increase); 1 is no damage."""
        return float(np.exp(self.loss_increase))

    @property
    def mean_divergence(self) -> float:
        """Mean KL(base || edited) over all tokens, in nats."""
        return float(np.average(self.divergence, weights=self.tokens))


def bundled_texts() -> list[str]:
    """Return the paragraphs of the bundled neutral text.

    Example:
        >>> len(bundled_texts()) > 10
        True
    """
    text = (files("sealign.demonstrations") / "data" / "neutral.txt").read_text(encoding="utf-8")
    return [paragraph.strip() for paragraph in text.split("\n\n") if paragraph.strip()]


@torch.no_grad()
def text_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, batch_size: int = 4
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the predicted tokens and the mean loss in nats of each text, with whatever edit is on the model.

    Args:
        model: the model.
        tokenizer: its own.
        texts: each of at least 2 tokens.
        batch_size: texts run together; 1 for an edit that is rescaled per feature.
    """
    encoded = [list(tokenizer.encode(text)) for text in texts]
    losses: list[float] = []
    with eval_mode(model):
        for start in range(0, len(encoded), batch_size):
            batch = encoded[start : start + batch_size]
            ids, mask = pad_right(batch, pad_token(tokenizer), input_device(model))
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            each = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
            seen = mask[:, 1:]
            losses += ((each.double() * seen).sum(1) / seen.sum(1)).tolist()
    return np.array([len(ids) - 1.0 for ids in encoded]), np.array(losses)


def rise_with_bound(
    tokens: NDArray[np.float64], base: NDArray[np.float64], edited: NDArray[np.float64]
) -> tuple[float, float]:
    """Return the mean rise of the loss over all tokens, and the upper end of its one-sided 95 % interval.

    With weights w_i, tokens of text i over all tokens, and rises d_i, the mean is m = sum w_i d_i, its standard error
    SE = sqrt(n / (n - 1) sum w_i^2 (d_i - m)^2) and the bound m + t_{n-1}(0.95) SE: texts that were not measured may
    suffer more than those that were.

    Args:
        tokens: predicted tokens of each text, (n,), n at least 2.
        base: mean loss of each without the edit, (n,).
        edited: mean loss of each with it, (n,).

    Example:
        >>> rise_with_bound(np.ones(2), np.zeros(2), np.array([0.5, 0.5]))
        (0.5, 0.5)
    """
    shares, rises = tokens / tokens.sum(), edited - base
    mean = float(shares @ rises)
    count = len(rises)
    error = np.sqrt(count / (count - 1) * float(np.square(shares) @ np.square(rises - mean)))
    return mean, float(mean + special.stdtrit(count - 1, 0.95) * error)


@torch.no_grad()
def measure_damage(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edit: Change,
    *,
    texts: Sequence[str] | None = None,
    batch_size: int = 4,
    track: Track = no_progress,
) -> Damage:
    """Return the losses of a model with and without an edit on texts, token by token in the same run.

    Args:
        model: the base model.
        tokenizer: its own.
        edit: what is to be measured, at its own strength.
        texts: neutral texts; the bundled ones if None.
        batch_size: texts run together.
        track: shows progress.
    """
    (damage,) = measure_damages(model, tokenizer, [edit], texts=texts, batch_size=batch_size, track=track)
    return damage


@torch.no_grad()
def measure_damages(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Change],
    *,
    texts: Sequence[str] | None = None,
    batch_size: int = 4,
    journal: Journal | None = None,
    track: Track = no_progress,
) -> list[Damage]:
    """Return the damage of each of several edits, running the base model once for all.

    Args:
        model: the base model.
        tokenizer: its own.
        edits: what is to be measured, each alone, at its own strength.
        texts: neutral texts; the bundled ones if None.
        batch_size: texts run together.
        journal: where finished batches are kept; of one model only.
        track: shows progress.
    """
    journal = Journal(None) if journal is None else journal
    hashes = [edit.hash for edit in edits]
    given = list(bundled_texts() if texts is None else texts)
    if any(isinstance(edit, Edit) and edit.settings.normalization == "feature" for edit in edits):
        batch_size = 1  # not defined for batches
    encoded = [list(tokenizer.encode(text)) for text in given]
    batches = [encoded[i : i + batch_size] for i in range(0, len(encoded), batch_size)]
    rows: list[list[Sequence[float]]] = [[] for _ in edits]
    with eval_mode(model):
        for batch in track(batches, "Measuring damage", len(batches)):
            key = Journal.key("damage", hashes, batch)
            if key not in journal:
                journal.put({key: list(_measure_batch(model, edits, batch, pad_token(tokenizer)))})
            for index, measured in enumerate(journal.get(key)):
                rows[index] += measured
    columns = [[np.array(column) for column in zip(*of_edit, strict=True)] for of_edit in rows]
    return [Damage(*of_edit) for of_edit in columns]


def _measure_batch(
    model: Any, edits: Sequence[Change], batch: Sequence[Sequence[int]], pad: int
) -> Iterator[list[tuple[float, ...]]]:
    """Yield, for each edit, (tokens, base loss, edited loss, divergence) of each text of a batch."""
    ids, mask = pad_right(batch, pad, input_device(model))
    targets = ids[:, 1:, None]

    def log_probabilities() -> torch.Tensor:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        return torch.log_softmax(logits.float(), dim=-1)

    base = log_probabilities()
    for edit in edits:
        with apply_change(model, edit):
            edited = log_probabilities()
        divergence = (base.exp() * (base - edited)).sum(-1)
        values = [-base.gather(2, targets)[..., 0], -edited.gather(2, targets)[..., 0], divergence]
        counts = [len(sequence) - 1 for sequence in batch]
        yield [
            (float(count), *(float(value[row, :count].double().mean()) for value in values))
            for row, count in enumerate(counts)
        ]
