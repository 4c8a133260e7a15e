"""Whether prompts of the harness can share their common prefix when a model generates from them."""

from __future__ import annotations

from typing import Any

import torch

from sealign.edits.intervention import Intervention
from sealign.evaluation.packed_scoring import can_be_packed, layer_kinds
from sealign.models.shared_prefix import share_prefix


def can_share_prefix(model: Any, edit: Intervention | None) -> bool:
    """Return whether the common prefix of prompts can be run once, with padding after it.

    A sliding window would count the padding, and an intervention with a cache of its own would miss the prefix.

    Args:
        model: The model.
        edit: Edit or other intervention that is attached to it, or None.
    """
    if edit is not None and edit.has_own_cache:
        return False
    return can_be_packed(model) and layer_kinds(model) == {"full_attention"}


def gap_of_sharing(model: Any, ids: Any, mask: Any) -> float:
    """Return the mean difference of log p(next token) over the vocabulary that a shared prefix makes in two rows.

    Args:
        model: The model, with the edits that are attached to it.
        ids, mask: As for ``share_prefix``.
    """
    shared = share_prefix(model, ids, mask)
    if shared is None:
        return 0.0
    tokens, seen, cache = shared
    start = cache.get_seq_length()

    def next_token(ids: Any, seen: Any, **kwargs: Any) -> Any:
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(input_ids=ids, attention_mask=seen, position_ids=positions, logits_to_keep=1, **kwargs)
        return torch.log_softmax(output.logits[:, -1].float(), dim=-1)

    apart = next_token(ids, mask, use_cache=False)
    together = next_token(tokens[:, start:], seen, use_cache=True, past_key_values=cache)
    return float((together - apart).abs().mean())
