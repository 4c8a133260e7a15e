"""Several interventions on one model: their order, their properties, and a failure in the middle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sealign.edits.attach import apply_edit, attach
from sealign.errors import FingerprintError, SettingError
from sealign.methods.composition import Composition
from tests.conftest import our_hooks
from tests.tiny_models import build_model, logits

Fitted = Callable[[str], Any]


def test_parts_compose_in_order(fitted: Fitted, llama: Any, tokenizer: Any) -> None:
    before = logits(llama, tokenizer)
    both = Composition([fitted("mean_difference"), fitted("icl"), fitted("best_of_n")])
    assert both.prefix == fitted("icl").prefix
    assert not both.changes_scores
    with apply_edit(llama, fitted("mean_difference")):
        expected = logits(llama, tokenizer)
    with apply_edit(llama, both) as handle:
        assert torch.equal(logits(llama, tokenizer), expected)
        with handle.switched(False):
            assert torch.equal(logits(llama, tokenizer), before)
        assert torch.equal(logits(llama, tokenizer), expected)
    assert torch.equal(logits(llama, tokenizer), before)
    assert both.hash != Composition(both.parts[:2]).hash
    with pytest.raises(SettingError, match="parts is empty, but a composition needs at least 1"):
        Composition([])


def test_order_matters_at_a_common_module(fitted: Fitted, llama: Any, tokenizer: Any) -> None:
    shift, eraser = fitted("mean_difference"), fitted("leace")  # both at layer 1 of the residual stream
    found = {}
    for parts in ((shift, eraser), (eraser, shift)):
        with apply_edit(llama, Composition(parts)):
            found[parts] = logits(llama, tokenizer)
        with apply_edit(llama, parts[0]), apply_edit(llama, parts[1]):
            assert torch.equal(logits(llama, tokenizer), found[parts])
    one, other = found.values()
    assert not torch.allclose(one, other)
    assert Composition((shift, eraser)).hash != Composition((eraser, shift)).hash


def test_properties_are_those_of_the_parts(fitted: Fitted, tmp_path: Path) -> None:
    parts = [fitted("sea"), fitted("mean_difference"), fitted("icd")]
    both = Composition(parts)
    assert both.parts == tuple(parts)
    assert both.method == "sea+mean_difference+icd"
    assert both.modules == [*parts[0].modules, *parts[1].modules]
    assert both.base_model == parts[0].base_model
    assert both.fit_seconds == sum(part.fit_seconds for part in parts)
    assert both.strength is None
    assert both.changes_scores
    assert both.has_own_cache
    assert both.is_causal
    assert not Composition([parts[0], parts[1].with_normalization("feature")]).is_causal
    assert not Composition(parts[:2]).has_own_cache
    assert both.tensors() == {}
    assert both.randomized(3) is None
    assert both.reversed() is None
    for call in (
        lambda: both.record,
        lambda: both.save_pretrained(tmp_path / "both"),
        lambda: Composition.from_record(parts[0].record, {}),
        lambda: both.with_strength(0.5),
    ):
        with pytest.raises(SettingError, match=r"part|strength"):
            call()
    assert not (tmp_path / "both").exists()


def test_a_part_that_cannot_be_attached_leaves_nothing(fitted: Fitted, tokenizer: Any) -> None:
    other = build_model("llama", vocab_size=len(tokenizer), num_hidden_layers=2)
    both = Composition([fitted("mean_difference"), fitted("best_of_n"), fitted("leace")])
    with pytest.raises(FingerprintError, match="num_hidden_layers"):
        attach(other, both)
    with pytest.raises(FingerprintError, match="no module 'model.layers.3'"):
        attach(other, both, ignore_mismatch=True)
    assert our_hooks(other) == 0
    assert "generate" not in vars(other)
