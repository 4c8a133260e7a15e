"""The edit bank against ``Projection``, token by token, for every kind of edit and mixed batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from sealign.edits.edit import Edit
from sealign.errors import ServingError
from sealign.serving.edit_bank import EditBank, size_for
from sealign.serving.edit_slots import BankSize, SiteBank
from sealign.serving.rows import rows_by_slot
from sealign.serving.settings import plan_bank
from sealign.spectral.projection import COMBINES, Projection

WIDTH = 13


def make_projection(
    seed: int, kp: int, kn: int, *, centered: bool = False, feature_map: str = "identity"
) -> Projection:
    generator = torch.Generator().manual_seed(seed)

    def basis(k: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(WIDTH, k, generator=generator))[0].contiguous()

    mean = torch.randn(WIDTH, generator=generator) / 3 if centered else None
    return Projection(basis(kp), basis(kn), mean, feature_map, torch.ones(kp), torch.ones(kn), float(kp), float(kn))


def edited(edit: Edit, layer: int, tokens: torch.Tensor) -> torch.Tensor:
    settings: Any = edit.settings
    return edit.projections[layer](
        tokens, combine=settings.combine, normalization=settings.normalization, strength=settings.strength
    )


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("normalization", ["token", "none"])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("feature_map", ["identity", "squared_exponential", "tanh", "elu"])
def test_every_kind_of_edit_equals_its_projection_in_a_mixed_batch(
    small_edit: Edit, combine: str, normalization: str, centered: bool, feature_map: str
) -> None:
    settings: Any = small_edit.with_settings(combine=combine, normalization=normalization, strength=0.7).settings  # type: ignore[arg-type]
    settings = dataclasses.replace(settings, feature_map=feature_map, centered=centered)
    first = make_projection(1, 3, 2, centered=centered, feature_map=feature_map)
    second = make_projection(2, 1, 4)
    plain: Any = dataclasses.replace(settings, feature_map="identity", centered=False, combine="both", strength=-0.4)
    site = SiteBank(WIDTH, BankSize(3, 5, ("elu", "squared_exponential", "tanh")), torch.device("cpu"))
    site.load(2, first, settings)
    site.load(3, second, plain)
    tokens = torch.randn(11, WIDTH)
    slots = torch.tensor([0, 2, 3, 2, 0, 0, 3, 2, 2, 1, 3])
    given = tokens.clone()
    found = site(tokens, slots)
    expected = tokens.clone()
    for slot, projection, chosen in ((2, first, settings), (3, second, plain)):
        rows = slots == slot
        expected[rows] = projection(
            tokens[rows], combine=chosen.combine, normalization=chosen.normalization, strength=chosen.strength
        )
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    assert torch.equal(found[slots == 0], tokens[slots == 0])
    assert torch.equal(tokens, given)
    # A slot that is loaded anew keeps nothing of what was there.
    site.load(2, second, plain)
    torch.testing.assert_close(site(tokens, torch.full((11,), 2)), site(tokens, torch.full((11,), 3)))
    site.clear(2)
    site.clear(3)
    torch.testing.assert_close(site(tokens, slots), tokens)


def test_tokens_of_zero_and_narrow_types(small_edit: Edit) -> None:
    site = SiteBank(WIDTH, BankSize(1, 5), torch.device("cpu"))
    projection = make_projection(3, 2, 3)
    site.load(1, projection, small_edit.settings)
    tokens = torch.randn(4, WIDTH).bfloat16()
    tokens[2] = 0
    found = site(tokens, torch.tensor([1, 0, 1, 1]))
    assert found.dtype == torch.bfloat16
    assert bool(torch.isfinite(found).all())
    expected = projection(tokens, strength=small_edit.settings.strength)
    torch.testing.assert_close(found[[0, 2, 3]], expected[[0, 2, 3]])


@pytest.fixture(params=[False, True], ids=["alone", "captured"])
def bank(request: pytest.FixtureRequest, small_edit: Edit) -> EditBank:
    modules = [f"model.layers.{layer}.mlp" for layer in range(5)]
    width = small_edit.projections[1].width
    return EditBank(modules, width, 20, BankSize(edits=2, rank=5), captured=request.param)


def test_a_batch_of_requests_is_edited_by_row(bank: EditBank, small_edit: Edit) -> None:
    mild = small_edit.with_settings(strength=0.1)
    bank.load(small_edit)
    bank.load(mild)
    bank.choose([(None, 2), (mild.hash, 3), (small_edit.hash, 1), (None, 1)])
    tokens = torch.randn(9, small_edit.projections[1].width)  # two rows of padding
    expected = tokens.clone()
    expected[2:5] = edited(mild, 3, tokens[2:5])
    expected[5:6] = edited(small_edit, 3, tokens[5:6])
    untouched = tokens.clone()
    bank.edit(0, untouched)  # a layer that no edit has
    assert torch.equal(untouched, tokens)
    bank.edit(3, tokens)
    torch.testing.assert_close(tokens, expected)
    bank.choose([(None, 9)])
    again = tokens.clone()
    bank.edit(3, again)
    assert torch.equal(again, tokens)


def test_the_residual_stream_is_edited_in_one_of_its_summands(bank: EditBank, small_edit: Edit) -> None:
    bank.load(small_edit)
    bank.choose([(None, 2), (small_edit.hash, 5)])
    hidden, residual = torch.randn(2, 8, small_edit.projections[1].width)
    before, kept = hidden.clone(), residual.clone()
    bank.edit_stream(1, hidden, residual)
    expected = edited(small_edit, 1, (before + residual)[2:7])
    torch.testing.assert_close((hidden + residual)[2:7], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(hidden[:2], before[:2])
    assert torch.equal(hidden[7:], before[7:])
    assert torch.equal(residual, kept)
    bank.choose_none()
    again = hidden.clone()
    bank.edit_stream(1, again, residual)
    assert torch.equal(again, hidden)


def test_buffers_keep_their_addresses(bank: EditBank, small_edit: Edit) -> None:
    def addresses() -> list[int]:
        sites = list(bank._sites.values())
        tensors = [t for site in sites for t in vars(site).values() if isinstance(t, torch.Tensor)]
        return [t.data_ptr() for t in [*tensors, bank._token_slots]]

    before = addresses()
    bank.load(small_edit)
    bank.choose([(small_edit.hash, 3)])
    bank.unload(small_edit.hash)
    bank.choose_none()
    assert addresses() == before


def test_what_does_not_fit_is_refused(bank: EditBank, small_edit: Edit) -> None:
    with pytest.raises(ServingError, match="is not loaded here"):
        bank.choose([(small_edit.hash, 2)])
    with pytest.raises(ServingError, match="per feature"):
        bank.load(small_edit.with_settings(normalization="feature"))
    narrow = EditBank(["model.layers.1.mlp", "model.layers.3.mlp"], 32, 20, BankSize(edits=1, rank=4))
    with pytest.raises(ServingError, match="rank 5, but this server has"):
        narrow.load(small_edit)
    with pytest.raises(ServingError, match=r"'model\.layers\.1\.mlp', for which"):
        EditBank(["model.layers.0.mlp"], 32, 20, BankSize(edits=1, rank=9)).load(small_edit)
    assert bank.hashes == []
    assert bank.load(small_edit) == bank.load(small_edit) == small_edit.hash
    bank.load(small_edit.reversed())
    with pytest.raises(ServingError, match="all 2 places"):
        bank.load(small_edit.randomized(0))
    bank.unload(small_edit.hash)
    assert bank.free == 1
    with pytest.raises(ServingError, match="is not loaded here"):
        bank.unload(small_edit.hash)
    bank.load(small_edit.randomized(0))


def test_feature_maps_need_room(small_edit: Edit) -> None:
    settings = dataclasses.replace(small_edit.settings, feature_map="tanh")
    record = dataclasses.replace(small_edit.record, settings=settings)
    mapped = dataclasses.replace(small_edit, record=record)
    assert size_for({"a": mapped, "b": small_edit}) == BankSize(2, 5, ("tanh",))
    plan = plan_bank({"a": mapped}, max_edits=3)
    assert (plan.outputs, plan.streams, plan.edits) == (("model.layers.*.mlp",), (), 3)
    with pytest.raises(ServingError, match="feature map 'tanh'"):
        EditBank(["model.layers.1.mlp", "model.layers.3.mlp"], 32, 9, BankSize(1, 9)).load(mapped)


def test_the_graph_is_one_for_every_choice(small_edit: Edit) -> None:
    """What a captured graph needs: the same operations on the same shapes, whatever the slots and their contents."""
    site = SiteBank(WIDTH, BankSize(2, 5, ("tanh",)), torch.device("cpu"))
    slots, tokens = torch.zeros(6, dtype=torch.int64), torch.randn(6, WIDTH)
    traced: Any = make_fx(site)(tokens, slots)
    site.load(1, make_projection(5, 3, 2), small_edit.settings)
    chosen = torch.tensor([0, 1, 1, 0, 0, 1])
    torch.testing.assert_close(traced(tokens, chosen), site(tokens, chosen))
    assert not torch.equal(traced(tokens, chosen), tokens)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=8))
def test_rows_of_each_slot(requests: list[tuple[int, int]]) -> None:
    slots = [slot for slot, count in requests for _ in range(count)]
    tokens = torch.arange(len(slots))
    found = {slot: tokens[rows].tolist() for slot, rows in rows_by_slot(requests)}
    assert found == {
        slot: [index for index, own in enumerate(slots) if own == slot] for slot in dict.fromkeys(slots) if slot
    }
