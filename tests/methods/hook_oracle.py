"""An edited model against hooks that know nothing of the library."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from sealign.edits.attach import apply_edit
from tests.tiny_models import logits


def remove(hooks: Iterable[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


def check_against_hooks(
    model: Any, tokenizer: Any, edit: Any, hooks: Iterable[RemovableHandle], *, least: float, tolerance: float
) -> None:
    """Compare a float64 model with an edit attached and the same model with hooks, which are removed.

    Args:
        model: Model in float64, on which the hooks are.
        tokenizer: Its tokenizer.
        edit: The edit.
        hooks: Handles of the hooks.
        least: Smallest change of a logit that the hooks must make.
        tolerance: Relative and absolute tolerance.
    """
    expected = logits(model, tokenizer)
    remove(hooks)
    before = logits(model, tokenizer)
    with apply_edit(model, edit):
        found = logits(model, tokenizer)
    assert found.dtype == torch.float64
    assert (expected - before).abs().max() > least
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
