"""Runs above shared layers against whole ones, for every architecture, site and depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import sealign
from sealign.edits.affine_edit import AffineEdit
from sealign.evaluation.damage import measure_passages
from sealign.evaluation.preference import preference_scores
from sealign.models import shared_layers
from sealign.models.passages import Passage
from sealign.models.shared_layers import run_shared, share_layers
from sealign.models.structure import decoder_layers
from tests.conftest import our_hooks
from tests.tiny_models import CONFIGS, build_model

IDS = torch.tensor([[5, 9, 2, 7, 11, 3], [4, 8, 6, 6, 1, 2]])


class Counter:
    """Counts how often each decoder layer of a model computes its MLP, or whatever is its last child."""

    def __init__(self, model: Any) -> None:
        self.ran: list[int] = []
        self._hooks = [
            list(layer.children())[-1].register_forward_hook(lambda *_, index=index: self.ran.append(index))
            for index, layer in enumerate(decoder_layers(model)[1])
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _edits(model: Any, tokenizer: Any, demonstrations: Any, site: Any, layer: int) -> list[sealign.Edit]:
    config = sealign.MeanDifferenceConfig(site=site, layers=[layer], strength=0.5)
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=config)
    return [edit, edit.reversed(), edit.with_strength(2.0)]


def _logits(model: Any, edit: Any = None) -> torch.Tensor:
    if edit is None:
        return run_shared(model, edited=False, input_ids=IDS).logits
    with sealign.apply_edit(model, edit):
        return run_shared(model, input_ids=IDS).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_edited_runs_are_whole_ones(
    name: str, tiny_model: Callable[[str], Any], tokenizer: Any, demonstrations: Any
) -> None:
    model = tiny_model(name)
    edits = _edits(model, tokenizer, demonstrations, "residual", 2)
    arms = [None, *edits, None]
    expected = [_logits(model, edit) for edit in arms]
    with share_layers(model, [edit.modules for edit in edits]):
        found = [_logits(model, edit) for edit in arms]
    for own, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(own, whole, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected[0], expected[1], atol=1e-4)


@pytest.mark.parametrize(("site", "expected"), [("residual", [2, 3]), ("mlp", [2, 3]), ("attention", [2, 3])])
def test_only_layers_from_the_edit_on_run_again(
    site: str, expected: list[int], llama: Any, tokenizer: Any, demonstrations: Any
) -> None:
    edits = _edits(llama, tokenizer, demonstrations, site, 2)
    if site == "residual":
        expected = [3]  # the output of layer 2 before it is edited is known
    with share_layers(llama, [edit.modules for edit in edits]):
        _logits(llama)
        _logits(llama, edits[0])  # compared with a whole run
        counter = Counter(llama)
        _logits(llama, edits[1])
        assert counter.ran == expected
        counter.ran.clear()
        _logits(llama)
        assert counter.ran == []
        run_shared(llama, input_ids=IDS[:, :4])
        assert counter.ran == [0, 1, 2, 3] * (len(counter.ran) // 4)  # another input
        counter.ran.clear()
        run_shared(llama, input_ids=IDS[:, :4], attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))
        assert counter.ran[:4] == [0, 1, 2, 3]  # another mask
    counter.ran.clear()
    _logits(llama, edits[1])
    assert counter.ran == [0, 1, 2, 3]
    counter.remove()
    assert our_hooks(llama) == 0
    assert all("forward" not in vars(module) for module in llama.modules())


def test_several_edits_share_what_is_below_the_lowest(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    low = _edits(llama, tokenizer, demonstrations, "residual", 1)[0]
    high = _edits(llama, tokenizer, demonstrations, "residual", 3)[0]
    expected = [_logits(llama, edit) for edit in (low, high)]
    with share_layers(llama, [high.modules]), share_layers(llama, [low.modules, high.modules]):
        assert all(torch.allclose(_logits(llama, e), own) for e, own in zip((low, high), expected, strict=True))
    with share_layers(llama, [low.modules]), share_layers(llama, [high.modules]):
        assert all(torch.allclose(_logits(llama, e), own) for e, own in zip((low, high), expected, strict=True))
    counter = Counter(llama)
    with share_layers(llama, [high.modules, []]):  # an intervention without modules may change anything
        for _ in range(2):
            counter.ran.clear()
            run_shared(llama, input_ids=IDS)
            assert counter.ran == [0, 1, 2, 3]
    counter.remove()


def test_a_model_whose_later_layers_need_more_than_the_residual_stream_runs_whole(
    tokenizer: Any, demonstrations: Any
) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    edit = _edits(model, tokenizer, demonstrations, "residual", 1)[0]
    kept: dict[str, Any] = {}
    model.model.layers[0].mlp.register_forward_hook(lambda _m, _i, out: kept.update(first=out))
    # The first run keeps the sum that the next one reads, so that a run above layer 1 finds an old one.
    model.model.layers[3].mlp.register_forward_hook(lambda _m, _i, out: out + kept.pop("first", torch.zeros(1)))
    whole = _logits(model, edit)
    with share_layers(model, [edit.modules]):
        _logits(model)
        for _ in range(2):
            torch.testing.assert_close(_logits(model, edit), whole)


def test_nothing_is_kept_beyond_the_limit(
    llama: Any, tokenizer: Any, demonstrations: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = _edits(llama, tokenizer, demonstrations, "residual", 2)[0]
    monkeypatch.setattr(shared_layers, "KEPT_BYTES", -1)
    counter = Counter(llama)
    with share_layers(llama, [edit.modules]):
        for _ in range(2):
            counter.ran.clear()
            _logits(llama, edit)
            assert counter.ran == [0, 1, 2, 3]
    counter.remove()


@pytest.mark.parametrize("site", ["residual", "mlp"])
def test_damage_and_preference_are_the_same(site: str, llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    edits = _edits(llama, tokenizer, demonstrations, site, 2)
    passages = [Passage((5, 9, 2, 7, 11, 3), 2), Passage((4, 8, 6), 1), Passage((12, 5, 5, 9, 7, 3, 2, 10, 6), 5)]
    together = measure_passages(llama, tokenizer, edits, passages, batch_size=2)
    with share_layers(llama, [edit.modules for edit in edits]):
        base = preference_scores(llama, tokenizer, demonstrations)["preference_margin"].numerators
        shared = []
        for edit in edits:
            with sealign.apply_edit(llama, edit):
                shared.append(preference_scores(llama, tokenizer, demonstrations)["preference_margin"].numerators)
    for edit, damage, margins in zip(edits, together, shared, strict=True):
        for row, passage in enumerate(passages):
            ids, first = torch.tensor([passage.ids]), passage.start - 1
            with torch.no_grad():
                before = torch.log_softmax(llama(input_ids=ids).logits[0, first:-1].double(), -1)
                with sealign.apply_edit(llama, edit):
                    after = torch.log_softmax(llama(input_ids=ids).logits[0, first:-1].double(), -1)
            targets = ids[0, passage.start :, None]
            assert damage.base[row] == pytest.approx(float(-before.gather(1, targets).mean()), abs=1e-5)
            assert damage.edited[row] == pytest.approx(float(-after.gather(1, targets).mean()), abs=1e-5)
            divergence = float((before.exp() * (before - after)).sum(1).mean())
            assert damage.divergence[row] == pytest.approx(divergence, abs=1e-5)
        with sealign.apply_edit(llama, edit):
            alone = preference_scores(llama, tokenizer, demonstrations)["preference_margin"].numerators
        np.testing.assert_allclose(margins, alone, atol=1e-5)
        assert not np.allclose(margins, base, atol=1e-4)


def test_an_edit_of_a_module_outside_the_layers_shares_nothing(llama: Any) -> None:
    direction = AffineEdit.constant(torch.ones(48))
    hook = llama.model.norm.register_forward_hook(lambda _m, _i, out: direction(out))
    counter = Counter(llama)
    with share_layers(llama, [["model.norm"]]):
        for _ in range(2):
            counter.ran.clear()
            run_shared(llama, input_ids=IDS)
            assert counter.ran == [0, 1, 2, 3]
    hook.remove()
    counter.remove()
