from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sealign.evaluation.choices import ChoiceRequest
from sealign.evaluation.packed_scoring import can_be_packed, pack_rows
from tests.tiny_models import CONFIGS, OTHER_CONFIGS, build_model


def test_the_structure_excludes_state_and_distances_that_a_row_would_mix(tiny_model: Callable[[str], Any]) -> None:
    assert all(can_be_packed(tiny_model(name)) for name in CONFIGS)
    assert {name for name in OTHER_CONFIGS if can_be_packed(tiny_model(name))} == {"gpt_neo"}
    assert not can_be_packed(build_model("falcon", vocab_size=90, alibi=True))


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), capacity=st.integers(1, 40))
def test_packing_keeps_every_request_and_the_capacity(lengths: list[int], capacity: int) -> None:
    requests = [ChoiceRequest((1,) * length, ((2,),)) for length in lengths]
    rows = list(pack_rows(requests, 0, capacity))
    assert sorted(index for row in rows for index, _ in row) == list(range(len(lengths)))
    for row in rows:
        assert len(row) == 1 or sum(request.length for _, request in row) <= capacity
