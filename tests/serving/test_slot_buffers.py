"""The buffers for captured graphs against ``LayerEdit`` in float64, for every kind of edit in mixed batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from sealign.edits.affine_edit import AffineEdit
from sealign.edits.gate import Gate
from sealign.edits.layer_edit import LayerEdit
from sealign.methods.sea import projection_edit
from sealign.serving.slot_buffers import SlotBuffers, SlotSizes
from sealign.spectral.feature_maps import FEATURE_MAPS
from sealign.spectral.projection import COMBINES, Projection

WIDTH = 13
MAPS = tuple(sorted(set(FEATURE_MAPS) - {"identity"}))


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sea(
    combine: Any, normalization: Any, *, centered: bool = False, feature_map: str = "identity", seed: int = 1
) -> LayerEdit:
    positive, negative = (torch.linalg.qr(random(WIDTH, k, seed=seed + k))[0].contiguous() for k in (3, 2))
    mean = random(WIDTH, seed=seed) / 3 if centered else None
    projection = Projection(positive, negative, mean, feature_map)
    return projection_edit(projection, combine=combine, normalization=normalization)


def oblique(**more: Any) -> AffineEdit:
    """As LEACE has it: left and right of different spans, about a center."""
    center = more.pop("center", random(WIDTH, seed=13))
    return AffineEdit(random(WIDTH, 2, seed=11) / 3, random(2, WIDTH, seed=12) / 3, center=center, **more)


EDITS: dict[str, LayerEdit] = {
    f"{combine} {normalization} {'centred' if centered else 'uncentred'} {name}": sea(
        combine, normalization, centered=centered, feature_map=name
    )
    for combine in COMBINES
    for normalization in ("token", "none")
    for centered in (False, True)
    for name in ("identity", *MAPS)
} | {
    "mean difference": AffineEdit.constant(random(WIDTH, seed=21)),
    "shift rescaled": AffineEdit.constant(random(WIDTH, seed=22), normalization="token"),
    "oblique about a center": oblique(),
    "oblique about a center, rescaled": oblique(normalization="token"),
    "oblique with all parts": oblique(scale=-0.3, shift=random(WIDTH, seed=23), normalization="token"),
    "oblique with shift": oblique(shift=random(WIDTH, seed=24), center=None),
    "scale alone": AffineEdit(torch.zeros(WIDTH, 0), torch.zeros(0, WIDTH), -0.4),
    "gated": oblique(shift=random(WIDTH, seed=25), gate=Gate(random(WIDTH, seed=30), 0.1)),
    "gated, with a feature map": dataclasses.replace(
        sea("both", "token", centered=True, feature_map=MAPS[0]), gate=Gate(random(WIDTH, seed=32), -0.2)
    ),
}


def in_float64(edit: LayerEdit, tokens: torch.Tensor, strength: float) -> torch.Tensor:
    return edit(tokens.double(), strength).float()


def buffers_for(edits: int, rank: int = 5) -> SlotBuffers:
    return SlotBuffers(WIDTH, SlotSizes(edits, rank, MAPS), torch.device("cpu"))


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("strength", [0.7, 1.0, -1.3])
def test_every_kind_of_edit_equals_its_layer_edit_in_a_mixed_batch(name: str, strength: float) -> None:
    edit, other = EDITS[name], sea("both", "token", seed=40)
    buffers = buffers_for(4)
    buffers.load(2, edit, strength)
    buffers.load(3, other, -0.4)
    buffers.load(4, edit, 0.0)
    tokens = random(13, WIDTH, seed=5) / 2  # away from the ends of the inverse maps, where float32 is less accurate
    slots = torch.tensor([0, 2, 3, 2, 0, 4, 3, 2, 2, 1, 3, 4, 0])
    given = tokens.clone()
    found = buffers(tokens, slots)
    expected = tokens.clone()
    expected[slots == 2] = in_float64(edit, tokens[slots == 2], strength)
    expected[slots == 3] = in_float64(other, tokens[slots == 3], -0.4)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    unedited = ~torch.isin(slots, torch.tensor([2, 3]))
    assert torch.equal(found[unedited], tokens[unedited])
    assert torch.equal(buffers.edited(slots)[:, 0], ~unedited)
    assert torch.equal(tokens, given)
    assert bool((found[slots == 2] - tokens[slots == 2]).abs().max() > 1e-2)


@pytest.mark.parametrize("feature_map", MAPS)
def test_large_activations_are_clipped_alike(feature_map: str) -> None:
    edit, buffers, tokens = EDITS[f"both none centred {feature_map}"], buffers_for(1), 20 * random(7, WIDTH, seed=10)
    buffers.load(1, edit, 1.0)
    found = buffers(tokens, torch.ones(7, dtype=torch.int64))
    torch.testing.assert_close(found, in_float64(edit, tokens, 1.0), atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("name", EDITS)
def test_a_slot_keeps_nothing_of_the_edit_before(name: str) -> None:
    buffers, fresh, tokens = buffers_for(2), buffers_for(2), random(4, WIDTH, seed=6)
    other, slots = oblique(scale=0.2), torch.full((4,), 2)
    fresh.load(2, other, 0.5)
    buffers.load(2, EDITS[name], 1.0)
    buffers.load(2, other, 0.5)
    assert torch.equal(buffers(tokens, slots), fresh(tokens, slots))
    buffers.clear(2)
    assert torch.equal(buffers(tokens, slots), tokens)
    for cleared, unused in zip(vars(buffers).values(), vars(buffers_for(2)).values(), strict=True):
        assert not isinstance(cleared, torch.Tensor) or torch.equal(cleared, unused)


@pytest.mark.parametrize("name", [name for name in EDITS if name.startswith("gated")])
def test_a_closed_gate_leaves_every_bit(name: str) -> None:
    edit, buffers, tokens = EDITS[name], buffers_for(2), random(40, WIDTH, seed=7)
    assert edit.gate is not None
    buffers.load(1, edit, 1.0)
    is_open = edit.gate.is_open(tokens)[:, 0]
    assert 5 < int(is_open.sum()) < 35
    found = buffers(tokens, torch.ones(40, dtype=torch.int64))
    assert torch.equal((found != tokens).any(-1), is_open)
    buffers.load(1, dataclasses.replace(edit, gate=None), 1.0)
    assert bool((buffers(tokens, torch.ones(40, dtype=torch.int64)) != tokens).any(-1).all())


def test_slots_do_not_share_columns() -> None:
    """Slots that are full to the last column."""
    edits = [sea("both", "none", seed=seed) for seed in (50, 60, 70)]
    buffers, tokens = buffers_for(3), random(9, WIDTH, seed=7)
    for slot, edit in enumerate(edits, start=1):
        buffers.load(slot, edit, 1.0)
    buffers.clear(2)
    slots = torch.tensor([1, 2, 3]).repeat(3)
    found = buffers(tokens, slots)
    for slot in (1, 3):
        expected = in_float64(edits[slot - 1], tokens[slots == slot], 1.0)
        torch.testing.assert_close(found[slots == slot], expected, atol=2e-5, rtol=2e-5)
    assert torch.equal(found[slots == 2], tokens[slots == 2])


def test_tokens_without_an_edit_pass_whatever_they_hold() -> None:
    tokens = torch.zeros(3, WIDTH)
    tokens[:, 0], tokens[:, 1], tokens[:, 2] = float("inf"), float("nan"), -0.0
    buffers = buffers_for(2)
    buffers.load(1, EDITS["oblique with all parts"], 1.0)
    buffers.load(2, EDITS["oblique with all parts"], 0.0)
    found = buffers(tokens, torch.tensor([0, 2, 2]))
    assert torch.equal(found.view(torch.int32), tokens.view(torch.int32))


@pytest.mark.parametrize("name", ["both token centred identity", "both token uncentred tanh", "shift rescaled"])
def test_tokens_of_zero_and_narrow_types(name: str) -> None:
    edit, buffers = EDITS[name], buffers_for(1)
    buffers.load(1, edit, 0.6)
    tokens = random(4, WIDTH, seed=8).bfloat16()
    tokens[2] = 0
    found = buffers(tokens, torch.tensor([1, 0, 1, 1]))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[1], tokens[1])
    expected = edit(tokens.double(), 0.6)[[0, 2, 3]]
    torch.testing.assert_close(found[[0, 2, 3]].double(), expected, atol=1e-2, rtol=2**-7)


def test_a_rescaled_token_that_is_erased_stays_zero() -> None:
    """y = 0, where the ratio of norms is not defined."""
    basis = torch.eye(WIDTH)[:, :2].contiguous()
    edit = AffineEdit(-basis, basis.T.contiguous(), normalization="token")
    buffers = buffers_for(1)
    buffers.load(1, edit, 1.0)
    tokens = torch.zeros(1, WIDTH)
    tokens[0, 0] = 3.0
    assert torch.equal(buffers(tokens, torch.tensor([1])), torch.zeros(1, WIDTH))
    assert torch.equal(edit(tokens), torch.zeros(1, WIDTH))


def test_the_graph_is_one_for_every_choice() -> None:
    """What a captured graph needs: the same operations on the same memory, whatever the slots and their contents."""
    buffers = buffers_for(2)
    slots, tokens = torch.zeros(6, dtype=torch.int64), random(6, WIDTH, seed=9)
    traced: Any = make_fx(buffers)(tokens, slots)
    addresses = [value.data_ptr() for value in vars(buffers).values() if isinstance(value, torch.Tensor)]
    buffers.load(1, EDITS["oblique with all parts"], 0.5)
    buffers.load(2, EDITS["average token centred elu"], 0.5)
    selected = torch.tensor([0, 1, 2, 0, 2, 1])
    torch.testing.assert_close(traced(tokens, selected), buffers(tokens, selected))
    assert not torch.equal(traced(tokens, selected), tokens)
    assert addresses == [value.data_ptr() for value in vars(buffers).values() if isinstance(value, torch.Tensor)]
