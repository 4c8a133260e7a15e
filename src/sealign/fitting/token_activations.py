"""The activations of every token of texts, or of their completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.errors import ActivationError
from sealign.models.batching import pad_right, pad_token
from sealign.models.eval_mode import eval_mode
from sealign.models.passages import Passage
from sealign.models.recorder import Recorder
from sealign.models.shared_layers import without_layers_above
from sealign.models.sites import ResolvedSite
from sealign.models.structure import decoder_of, input_device
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 8
"""Number of passages that run together."""


@torch.no_grad()
def collect_token_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    passages: Sequence[Passage],
    sites: Sequence[ResolvedSite],
    *,
    track: Track = no_progress,
) -> dict[int, Float[Tensor, "t d"]]:
    """Return the activations of the scored tokens of passages, and of the token before them, by layer.

    Args:
        model: Any decoder of transformers.
        tokenizer: Tokenizer of the model.
        passages: Passages; at least 1. Of a whole text, all tokens are read.
        sites: Modules to read, one for each layer.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.

    Returns:
        Mapping from layer to the activations, (t, d) float32 on the CPU each, longest passage first.

    Raises:
        ActivationError: An activation is NaN or infinite; the message names the layer.
    """
    ordered = sorted(passages, key=lambda passage: len(passage.ids), reverse=True)
    batches = [ordered[first : first + BATCH] for first in range(0, len(ordered), BATCH)]
    found: dict[int, list[Tensor]] = {site.layer: [] for site in sites}
    recorder = Recorder(sites, lambda output, _: output.reshape(-1, output.shape[-1]))
    with eval_mode(model), recorder, without_layers_above(model, sites):
        for batch in track(batches, "Reading texts", len(batches)):
            encoded = [list(passage.ids) for passage in batch]
            ids, mask = pad_right(encoded, pad_token(tokenizer, model), input_device(model))
            decoder_of(model)(input_ids=ids, attention_mask=mask, use_cache=False)
            seen = mask.bool().cpu()
            for row, passage in zip(seen, batch, strict=True):
                row[: passage.start - 1] = False
            for layer, output in recorder.recorded.items():
                found[layer].append(output.float().cpu()[seen.flatten()])
    rows = {layer: torch.cat(parts) for layer, parts in found.items()}
    broken = [layer for layer, own in rows.items() if not bool(torch.isfinite(own).all())]
    if broken:
        raise ActivationError(
            f"NaN or infinity in the activations of layer {broken[0]} on texts; use a dtype with a larger range "
            "(float32 or bfloat16)"
        )
    return rows
