"""Deviation: the effect of leaving out the rescaling of an edit, as an approximate export does."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sealign.edits.attach import apply_edit
from sealign.edits.edit import Edit
from sealign.files import write_bytes
from sealign.models.eval_mode import eval_mode
from sealign.models.structure import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEVIATION_NAME = "deviation.json"


@dataclass(frozen=True)
class Deviation:
    """Difference between an edit and the same edit without its rescaling, over the tokens of texts.

    Attributes:
        mean_divergence: Mean of KL(edit || edit without rescaling), in nats.
        largest_divergence: Largest of these divergences, in nats.
        same_top: Share of tokens after which both predict the same token, in [0, 1].
    """

    mean_divergence: float
    largest_divergence: float
    same_top: float

    def save(self, folder: Path) -> None:
        """Write ``deviation.json``, with null for what is NaN or infinite.

        Args:
            folder: Folder of the export, before it is complete.
        """
        data = json.dumps(self.as_data(), indent=2, allow_nan=False)
        write_bytes(folder / DEVIATION_NAME, data.encode() + b"\n")

    @property
    def broken(self) -> bool:
        """Whether a probability is NaN or infinite, with or without the rescaling."""
        return not (math.isfinite(self.mean_divergence) and math.isfinite(self.largest_divergence))

    def as_data(self) -> dict[str, Any]:
        """Return the figures by name as JSON data, None where they are NaN or infinite, and whether one is."""
        figures = dataclasses.asdict(self)
        return {name: value if math.isfinite(value) else None for name, value in figures.items()} | {
            "broken": self.broken
        }


@torch.no_grad()
def measure_deviation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edit: Edit,
    texts: Sequence[str],
    *,
    ignore_mismatch: bool = False,
) -> Deviation:
    """Return the difference between an edit and the same edit without its rescaling.

    Args:
        model: The base model.
        tokenizer: Tokenizer of the model.
        edit: A rescaled edit.
        texts: Plain texts of at least 1 token each.
        ignore_mismatch: Whether to accept a model with another fingerprint.

    Raises:
        FingerprintError: The model is not the one that the edit was fitted on.
    """
    divergences, same = [], []
    with eval_mode(model):
        for text in texts:
            ids = torch.tensor([list(tokenizer.encode(text))], device=input_device(model))
            logs = []
            for arm in (edit, edit.with_normalization("none")):
                with apply_edit(model, arm, ignore_mismatch=ignore_mismatch):
                    output: Any = model(input_ids=ids, use_cache=False)
                logs.append(torch.log_softmax(output.logits[0].double(), dim=-1))
            divergences.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1).cpu().numpy())
            same.append((logs[0].argmax(-1) == logs[1].argmax(-1)).cpu().numpy())
    joined = np.concatenate(divergences)
    return Deviation(float(joined.mean()), float(joined.max()), float(np.concatenate(same).mean()))
