"""Damage: what an edit costs a model on plain text that has nothing to do with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sealign.apply import apply_edit
from sealign.edit import SpectralEdit
from sealign.generation import evaluating
from sealign.prefix import input_device, pad_right, pad_token
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
    def mean_divergence(self) -> float:
        """Mean KL(base || edited) over all tokens, in nats."""
        return float(np.average(self.divergence, weights=self.tokens))


def bundled_texts() -> list[str]:
    """Return the paragraphs of the bundled neutral text.

    Example:
        >>> len(bundled_texts()) > 10
        True
    """
    text = (files("sealign") / "data" / "neutral.txt").read_text(encoding="utf-8")
    return [paragraph.strip() for paragraph in text.split("\n\n") if paragraph.strip()]


@torch.no_grad()
def measure_damage(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edit: SpectralEdit,
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
    given = list(bundled_texts() if texts is None else texts)
    if edit.settings.normalization == "feature":
        batch_size = 1  # not defined for batches
    encoded = [list(tokenizer.encode(text)) for text in given]
    batches = [encoded[i : i + batch_size] for i in range(0, len(encoded), batch_size)]
    rows: list[tuple[float, ...]] = []
    with evaluating(model), apply_edit(model, edit) as handle:
        for batch in track(batches, "Measuring damage", len(batches)):
            rows += _measure_batch(model, handle, batch, pad_token(tokenizer))
    tokens, base, edited, divergence = (np.array(column) for column in zip(*rows, strict=True))
    return Damage(tokens, base, edited, divergence)


def _measure_batch(model: Any, handle: Any, batch: Sequence[Sequence[int]], pad: int) -> list[tuple[float, ...]]:
    device = input_device(model)
    ids, mask = pad_right(batch, pad, device)
    logs = {}
    for enabled in (False, True):
        handle.enabled = enabled
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        logs[enabled] = torch.log_softmax(logits.float(), dim=-1)
    targets = ids[:, 1:, None]
    losses = {enabled: -log.gather(2, targets)[..., 0] for enabled, log in logs.items()}
    divergence = (logs[False].exp() * (logs[False] - logs[True])).sum(-1)
    rows = []
    for row, sequence in enumerate(batch):
        count = len(sequence) - 1
        values = [losses[False], losses[True], divergence]
        rows.append((float(count), *(float(value[row, :count].double().mean()) for value in values)))
    return rows
