"""Damage: how much an edit raises the loss of a model on text unrelated to the edit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sealign.demonstrations.bundled import neutral_texts
from sealign.edits.attach import apply_edit
from sealign.edits.intervention import Intervention
from sealign.errors import SettingError
from sealign.evaluation.increase import increase_interval, increase_with_bound
from sealign.evaluation.journal import Journal
from sealign.models.batching import pad_right, pad_token
from sealign.models.eval_mode import eval_mode
from sealign.models.passages import Passage, text_passages
from sealign.models.shared_layers import run_shared, share_layers
from sealign.models.shared_prefix import Prefix, common_prefix
from sealign.models.structure import input_device, logits_kept
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Damage:
    """Losses of the base model and the edited model on texts; averages over texts are weighted by token count.

    Attributes:
        tokens: Number of predicted tokens of each text, (n,).
        base: Mean loss of the base model on each text, in nats per token, (n,).
        edited: Mean loss of the edited model on each text, in nats per token, (n,).
        divergence: Mean KL(base || edited) on each text, in nats per token, (n,).
    """

    tokens: NDArray[np.float64]
    base: NDArray[np.float64]
    edited: NDArray[np.float64]
    divergence: NDArray[np.float64]

    @property
    def base_loss(self) -> float:
        """Mean loss of the base model over all tokens, in nats per token."""
        return float(np.average(self.base, weights=self.tokens))

    @property
    def edited_loss(self) -> float:
        """Mean loss of the edited model over all tokens, in nats per token."""
        return float(np.average(self.edited, weights=self.tokens))

    @property
    def loss_increase(self) -> float:
        """Edited loss minus base loss, in nats per token; the logarithm of the perplexity ratio."""
        return self.edited_loss - self.base_loss

    @property
    def perplexity_ratio(self) -> float:
        """Edited perplexity divided by base perplexity, exp(loss increase); 1 means no damage."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.loss_increase))

    @property
    def mean_divergence(self) -> float:
        """Mean KL(base || edited) over all tokens, in nats per token."""
        return float(np.average(self.divergence, weights=self.tokens))

    @property
    def loss_interval(self) -> tuple[float, float]:
        """Ends of the 95 % interval of ``loss_increase`` over texts; see ``increase_interval``."""
        return increase_interval(self.tokens, self.base, self.edited)

    @property
    def loss_bound(self) -> float:
        """Upper end of the one-sided 95 % interval of ``loss_increase`` over texts; see ``increase_with_bound``."""
        return increase_with_bound(self.tokens, self.base, self.edited)[1]

    @property
    def divergence_interval(self) -> tuple[float, float]:
        """Ends of the 95 % interval of ``mean_divergence`` over texts, at least 0; see ``increase_interval``."""
        low, high = increase_interval(self.tokens, np.zeros_like(self.divergence), self.divergence)
        return max(low, 0.0), high

    @property
    def divergence_bound(self) -> float:
        """Upper end of the one-sided 95 % interval of ``mean_divergence`` over texts; see ``increase_with_bound``."""
        return increase_with_bound(self.tokens, np.zeros_like(self.divergence), self.divergence)[1]


def measure_damage(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edit: Intervention,
    *,
    texts: Sequence[str] | None = None,
    batch_size: int = 4,
    ignore_mismatch: bool = False,
    track: Track = no_progress,
) -> Damage:
    """Return the losses of a model on texts with and without an edit, computed in the same run.

    Args:
        model, tokenizer, texts, batch_size, ignore_mismatch, track: As for ``measure_damages``.
        edit: Edit or other intervention, measured at its own strength.
    """
    (damage,) = measure_damages(
        model,
        tokenizer,
        [edit],
        texts=texts,
        batch_size=batch_size,
        ignore_mismatch=ignore_mismatch,
        track=track,
    )
    return damage


def measure_damages(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Intervention],
    *,
    texts: Sequence[str] | None = None,
    batch_size: int = 4,
    journal: Journal | None = None,
    ignore_mismatch: bool = False,
    track: Track = no_progress,
) -> list[Damage]:
    """Return the damage of each of several edits on texts; the base model runs once for all of them.

    Args:
        model, tokenizer, edits, batch_size, journal, ignore_mismatch, track: As for ``measure_passages``.
        texts: At least 2 texts of at least 2 tokens each, unrelated to the edits; the bundled neutral texts if None.

    Raises:
        SettingError: There are fewer than 2 texts.
    """
    passages = text_passages(tokenizer, neutral_texts() if texts is None else texts)
    return measure_passages(
        model,
        tokenizer,
        edits,
        passages,
        batch_size=batch_size,
        journal=journal,
        ignore_mismatch=ignore_mismatch,
        track=track,
    )


def check_passages(passages: Sequence[Passage]) -> None:
    """Raise an error if damage cannot be measured on passages, since it has an interval over them.

    Args:
        passages: Passages; a text of fewer than 2 tokens is none.

    Raises:
        SettingError: There are fewer than 2 passages.
    """
    if len(passages) < 2:
        raise SettingError(
            f"damage is measured on {len(passages)} text{'' if len(passages) == 1 else 's'} of 2 tokens or more, but "
            "its interval needs at least 2; give more texts"
        )


@torch.no_grad()
def measure_passages(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Intervention],
    passages: Sequence[Passage],
    *,
    batch_size: int = 4,
    journal: Journal | None = None,
    ignore_mismatch: bool = False,
    track: Track = no_progress,
) -> list[Damage]:
    """Return the damage of each of several edits on the scored tokens of passages.

    Args:
        model: The base model.
        tokenizer: Tokenizer of the model.
        edits: Edits or other interventions, each measured alone and at its own strength.
        passages: At least 2 passages.
        batch_size: Number of passages to run together; 1 is used if an edit is not causal.
        journal: Journal of finished batches. Must not be shared between models.
        ignore_mismatch: Whether to accept a model with another fingerprint.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.

    Raises:
        SettingError: There are fewer than 2 passages.
    """
    check_passages(passages)
    journal = Journal(None) if journal is None else journal
    hashes = [edit.hash for edit in edits]
    if not all(edit.is_causal for edit in edits):
        batch_size = 1  # padding would change the edit
    batches = [passages[i : i + batch_size] for i in range(0, len(passages), batch_size)]
    rows: list[list[Sequence[float]]] = [[] for _ in edits]
    pad = pad_token(tokenizer, model)
    with eval_mode(model):
        for batch in track(batches, "Measuring damage", len(batches)):
            key = Journal.key("damage", hashes, [[passage.ids, passage.start] for passage in batch])
            if key not in journal:
                with share_layers(model, [edit.modules for edit in edits]):
                    journal.put({key: list(_measure_batch(model, edits, batch, pad, ignore_mismatch))})
            for index, measured in enumerate(journal.get(key)):
                rows[index] += [[float(value) for value in text] for text in measured]
    columns = [[np.array(column) for column in zip(*of_edit, strict=True)] for of_edit in rows]
    return [Damage(*of_edit) for of_edit in columns]


def _measure_batch(
    model: Any, edits: Sequence[Intervention], batch: Sequence[Passage], pad: int, ignore_mismatch: bool
) -> Iterator[list[tuple[float, ...]]]:
    """Yield, for each edit, (tokens, base loss, edited loss, divergence) of each passage of a batch."""
    device = input_device(model)
    # Of prompts, which are alike. One sequence alone has nothing to share.
    beginning = common_prefix([passage.ids[: passage.start] for passage in batch]) if len(batch) > 1 else []
    ids, mask = pad_right([passage.ids for passage in batch], pad, device)
    skipped = min(passage.start for passage in batch) - 1  # positions whose next token is not scored in any passage
    targets = ids[:, skipped + 1 :, None]

    def log_probabilities(*, edited: bool) -> torch.Tensor:
        prefix = Prefix.run(model, beginning, device)
        kept = logits_kept(model, ids.shape[1] - skipped)
        own = ids[:, len(prefix.ids) :]
        found = run_shared(model, prefix=prefix, edited=edited, input_ids=own, attention_mask=mask, **kept).logits
        return torch.log_softmax(found[:, skipped - ids.shape[1] : -1].float(), dim=-1)

    base = log_probabilities(edited=False)
    probabilities, base_loss = base.exp(), -base.gather(2, targets)[..., 0]
    for edit in edits:
        with apply_edit(model, edit, ignore_mismatch=ignore_mismatch):
            edited = log_probabilities(edited=True)
        loss = -edited.gather(2, targets)[..., 0]
        divergence = torch.linalg.vecdot(probabilities, torch.sub(base, edited, out=edited))
        yield [
            (
                float(passage.count),
                *(
                    float(value[row, passage.start - 1 - skipped : len(passage.ids) - 1 - skipped].double().mean())
                    for value in (base_loss, loss, divergence)
                ),
            )
            for row, passage in enumerate(batch)
        ]
