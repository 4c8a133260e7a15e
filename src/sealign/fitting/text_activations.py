"""The activations of every token of plain texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.errors import ActivationError
from sealign.models.batching import pad_right, pad_token
from sealign.models.eval_mode import eval_mode
from sealign.models.recorder import Recorder
from sealign.models.shared_layers import without_layers_above
from sealign.models.sites import ResolvedSite
from sealign.models.structure import decoder_of, input_device
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 8
"""Number of texts that run together."""


@torch.no_grad()
def collect_text_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    sites: Sequence[ResolvedSite],
    *,
    track: Track = no_progress,
) -> dict[int, Float[Tensor, "t d"]]:
    """Return the activations of all tokens of texts by layer, (t, d) float32 on the CPU each.

    Args:
        model: Any decoder of transformers.
        tokenizer: Tokenizer of the model.
        texts: Texts; at least 1.
        sites: Modules to read, one for each layer.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.

    Raises:
        ActivationError: An activation is NaN or infinite; the message names the layer.
    """
    encoded = sorted((list(tokenizer.encode(text)) for text in texts), key=len, reverse=True)
    batches = [encoded[first : first + BATCH] for first in range(0, len(encoded), BATCH)]
    found: dict[int, list[Tensor]] = {site.layer: [] for site in sites}
    recorder = Recorder(sites, lambda output, _: output.reshape(-1, output.shape[-1]))
    with eval_mode(model), recorder, without_layers_above(model, sites):
        for batch in track(batches, "Reading ordinary text", len(batches)):
            ids, mask = pad_right(batch, pad_token(tokenizer, model), input_device(model))
            decoder_of(model)(input_ids=ids, attention_mask=mask, use_cache=False)
            seen = mask.bool().flatten().cpu()
            for layer, output in recorder.recorded.items():
                found[layer].append(output.float().cpu()[seen])
    rows = {layer: torch.cat(parts) for layer, parts in found.items()}
    broken = [layer for layer, own in rows.items() if not bool(torch.isfinite(own).all())]
    if broken:
        raise ActivationError(
            f"NaN or infinity in the activations of layer {broken[0]} on plain text; use a dtype with a larger range "
            "(float32 or bfloat16)"
        )
    return rows
