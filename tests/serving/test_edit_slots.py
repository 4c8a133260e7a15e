"""Slots for edits: mixed batches of requests on both paths, loading and unloading."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sealign.edits.affine_edit import AffineEdit
from sealign.edits.edit import Edit
from sealign.edits.feature_map_edit import FeatureMapEdit
from sealign.edits.gate import Gate
from sealign.edits.layer_edit import LayerEdit
from sealign.errors import ServingError
from sealign.serving.edit_slots import EditSlots, sizes_for, tokens_by_slot
from sealign.serving.settings import plan_slots
from sealign.serving.slot_buffers import SlotSizes
from sealign.spectral.projection import Projection

MAPS = ("elu", "squared_exponential", "tanh")


def with_layer_edits(edit: Edit, make: Any) -> Edit:
    """The same layers with other edits; ``make`` is given a generator and the width."""
    made: dict[int, LayerEdit] = {}
    for layer in edit.layers:
        made[layer] = make(torch.Generator().manual_seed(layer), edit.width)
    first = next(iter(made.values()))
    record = dataclasses.replace(edit.record, normalization=first.normalization, feature_map=first.feature_map)
    return Edit(made, record)


def shift(generator: torch.Generator, width: int) -> LayerEdit:
    return AffineEdit.constant(torch.randn(width, generator=generator) / 4)


def rescaled_shift(generator: torch.Generator, width: int) -> LayerEdit:
    return AffineEdit.constant(torch.randn(width, generator=generator) / 4, normalization="token")


def oblique(generator: torch.Generator, width: int) -> LayerEdit:
    left, right, center = (torch.randn(*shape, generator=generator) / 4 for shape in ((width, 2), (2, width), (width,)))
    return AffineEdit(left, right, center=center)


def gated(generator: torch.Generator, width: int) -> LayerEdit:
    return dataclasses.replace(oblique(generator, width), gate=Gate(torch.randn(width, generator=generator), 0.05))


def mapped(name: str) -> Any:
    def make(generator: torch.Generator, width: int) -> LayerEdit:
        factors = torch.linalg.qr(torch.randn(width, 5, generator=generator))[0]
        mean = torch.randn(width, generator=generator) / 4
        projection = Projection(factors[:, :3].contiguous(), factors[:, 3:].contiguous(), mean, name)
        return FeatureMapEdit(projection, "average", normalization="token")

    return make


KINDS: dict[str, Any] = {"shift": shift, "rescaled shift": rescaled_shift, "oblique": oblique, "gated": gated} | {
    name: mapped(name) for name in MAPS
}


@pytest.fixture(params=[False, True], ids=["uncaptured", "captured"])
def slots(request: pytest.FixtureRequest, small_edit: Edit) -> EditSlots:
    modules = [f"model.layers.{layer}.mlp" for layer in range(5)]
    sizes = SlotSizes(edits=2, rank=5, feature_maps=MAPS)
    return EditSlots(modules, small_edit.width, max_tokens=20, sizes=sizes, captured=request.param)


def in_float64(edit: Edit, layer: int, tokens: torch.Tensor) -> torch.Tensor:
    return edit.layer_edits[layer](tokens.double(), edit.strength).float()


def test_a_batch_of_requests_is_edited_by_row(slots: EditSlots, small_edit: Edit) -> None:
    mild = small_edit.with_strength(0.1)
    slots.load(small_edit)
    slots.load(mild)
    slots.select([(None, 2), (mild.hash, 3), (small_edit.hash, 1), (None, 1)])
    tokens = torch.randn(9, small_edit.width)  # two rows of padding
    expected = tokens.clone()
    expected[2:5] = in_float64(mild, 3, tokens[2:5])
    expected[5:6] = in_float64(small_edit, 3, tokens[5:6])
    untouched = tokens.clone()
    slots.edit_output(0, untouched)  # a layer that neither edit has
    assert torch.equal(untouched, tokens)
    given = tokens.clone()
    slots.edit_output(3, tokens)
    torch.testing.assert_close(tokens, expected)
    assert torch.equal(tokens[[0, 1, 6, 7, 8]], given[[0, 1, 6, 7, 8]])
    slots.select([(None, 9)])
    again = tokens.clone()
    slots.edit_output(3, again)
    assert torch.equal(again, tokens)
    slots.select([])
    slots.edit_output(3, again)
    assert torch.equal(again, tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_edits_of_every_kind_beside_sea(slots: EditSlots, small_edit: Edit, kind: str) -> None:
    edit = with_layer_edits(small_edit, KINDS[kind])
    slots.load(edit)
    slots.load(small_edit)
    slots.select([(edit.hash, 2), (small_edit.hash, 1), (None, 1), (edit.hash, 3)])
    own, other = [0, 1, 4, 5, 6], [2]
    tokens = torch.randn(8, small_edit.width)
    expected = tokens.clone()
    expected[own] = in_float64(edit, 1, tokens[own])
    expected[other] = in_float64(small_edit, 1, tokens[other])
    hidden, residual = tokens / 3, tokens - tokens / 3
    given = hidden.clone()
    slots.edit_output(1, tokens)
    torch.testing.assert_close(tokens, expected, atol=2e-5, rtol=2e-5)
    slots.edit_stream(1, hidden, residual)
    torch.testing.assert_close(hidden + residual, expected, atol=2e-5, rtol=2e-5)
    assert torch.equal(hidden[[3, 7]], given[[3, 7]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_closed_gate_leaves_every_bit_of_the_residual_stream(
    slots: EditSlots, small_edit: Edit, dtype: torch.dtype
) -> None:
    edit = with_layer_edits(small_edit, gated)
    slots.load(edit)
    slots.select([(edit.hash, 15), (None, 4)])
    hidden, residual = torch.randn(2, 20, small_edit.width, generator=torch.Generator().manual_seed(4)).to(dtype)
    before = hidden.clone()
    gate = edit.layer_edits[1].gate
    assert gate is not None
    is_open = gate.is_open(hidden.float() + residual.float())[:, 0]
    is_open[15:] = False
    assert 3 < int(is_open.sum()) < 12
    slots.edit_stream(1, hidden, residual)
    assert torch.equal((hidden != before).any(-1), is_open)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_residual_stream_is_edited_in_one_of_its_summands(
    slots: EditSlots, small_edit: Edit, dtype: torch.dtype
) -> None:
    slots.load(small_edit)
    slots.select([(None, 2), (small_edit.hash, 5)])
    hidden, residual = torch.randn(2, 8, small_edit.width).to(dtype)
    before, kept = hidden.clone(), residual.clone()
    slots.edit_stream(1, hidden, residual)
    expected = small_edit.layer_edits[1]((before.double() + residual.double())[2:7], small_edit.strength)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8 * float(hidden.abs().max())
    torch.testing.assert_close((hidden.double() + residual.double())[2:7], expected, atol=tolerance, rtol=0)
    assert torch.equal(hidden[:2], before[:2])
    assert torch.equal(hidden[7:], before[7:])
    assert torch.equal(residual, kept)
    slots.select_none()
    again = hidden.clone()
    slots.edit_stream(1, again, residual)
    assert torch.equal(again, hidden)


def test_strength_zero_and_no_edit_change_no_bit(slots: EditSlots, small_edit: Edit) -> None:
    off = with_layer_edits(small_edit, oblique).with_strength(0.0)
    slots.load(small_edit)
    slots.load(off)
    slots.select([(off.hash, 2), (None, 2), (small_edit.hash, 1)])
    tokens = torch.randn(6, small_edit.width)
    tokens[:4, 0], tokens[:4, 1], tokens[:4, 2] = float("inf"), -0.0, float("nan")
    residual = torch.zeros_like(tokens)
    stream, output = tokens.clone(), tokens.clone()
    slots.edit_output(1, output)
    slots.edit_stream(1, stream, residual)
    for found in (output, stream):
        assert torch.equal(found[[0, 1, 2, 3, 5]].view(torch.int32), tokens[[0, 1, 2, 3, 5]].view(torch.int32))
        assert not torch.equal(found[4], tokens[4])


def test_buffers_keep_their_addresses(slots: EditSlots, small_edit: Edit) -> None:
    def addresses() -> list[int]:
        tensors = [t for own in slots._buffers.values() for t in vars(own).values() if isinstance(t, torch.Tensor)]
        return [t.data_ptr() for t in [*tensors, slots._token_slots]]

    before = addresses()
    slots.load(small_edit)
    slots.select([(small_edit.hash, 3)])
    slots.unload(small_edit.hash)
    slots.select_none()
    assert addresses() == before


def test_what_does_not_fit_is_refused(slots: EditSlots, small_edit: Edit) -> None:
    with pytest.raises(ServingError, match="is not loaded in this worker"):
        slots.select([(small_edit.hash, 2)])
    with pytest.raises(ServingError, match="per feature"):
        slots.load(small_edit.with_normalization("feature"))
    modules = ["model.layers.1.mlp", "model.layers.3.mlp"]

    def sized(paths: list[str], width: int, rank: int) -> EditSlots:
        return EditSlots(paths, width, max_tokens=20, sizes=SlotSizes(edits=1, rank=rank))

    with pytest.raises(ServingError, match="width 48 and rank 5, but the slots of this server have width 48 and rank"):
        sized(modules, small_edit.width, 4).load(small_edit)
    with pytest.raises(ServingError, match="have width 32 and rank 5"):
        sized(modules, 32, 5).load(small_edit)
    with pytest.raises(ServingError, match=r"'model\.layers\.3\.mlp', for which"):
        sized(modules[:1], small_edit.width, 9).load(small_edit)
    with pytest.raises(ServingError, match="feature map 'tanh', but this server was started for identity;"):
        sized(modules, small_edit.width, 9).load(with_layer_edits(small_edit, mapped("tanh")))
    assert slots.hashes == []
    assert slots.load(small_edit) == slots.load(small_edit) == small_edit.hash
    slots.load(small_edit.reversed())
    with pytest.raises(ServingError, match="all 2 slots"):
        slots.load(small_edit.randomized(0))
    slots.unload(small_edit.hash)
    assert slots.free == 1
    with pytest.raises(ServingError, match="is not loaded in this worker"):
        slots.unload(small_edit.hash)
    slots.load(small_edit.randomized(0))


def test_sizes_are_those_that_the_edits_need(small_edit: Edit) -> None:
    tanh, constant = (with_layer_edits(small_edit, make) for make in (mapped("tanh"), shift))
    assert sizes_for({"a": tanh, "b": small_edit}) == SlotSizes(2, 5, ("tanh",))
    assert sizes_for({"a": constant}, at_least=4) == SlotSizes(4, 1, ())
    assert sizes_for({}) == SlotSizes(1, 1, ())
    plan = plan_slots({"a": tanh}, max_edits=3)
    assert (plan.outputs, plan.streams, plan.edits) == (("model.layers.*.mlp",), (), 3)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=8))
def test_tokens_of_each_slot(requests: list[tuple[int, int]]) -> None:
    slots = [slot for slot, count in requests for _ in range(count)]
    tokens = torch.arange(len(slots))
    found = {slot: tokens[index].tolist() for slot, index in tokens_by_slot(requests)}
    assert found == {
        slot: [index for index, own in enumerate(slots) if own == slot] for slot in dict.fromkeys(slots) if slot
    }
