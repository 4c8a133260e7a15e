"""Which layers a choice such as ``last:21/32`` or ``4,5,-1`` means."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealign.errors import SettingError, SiteError
from sealign.models.sites import parse_layers, select_layers

properties = settings(max_examples=80, deadline=None, derandomize=True)
depths = st.integers(1, 80)


@properties
@given(depth=depths, data=st.data())
def test_last_and_first(depth: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, depth))
    everything = list(range(depth))
    assert select_layers(f"last:{count}", depth) == everything[-count:]
    assert select_layers(f"first:{count}", depth) == everything[:count]
    assert select_layers("all", depth) == everything


@properties
@given(depth=depths, below=st.integers(1, 40), data=st.data(), kind=st.sampled_from(["last", "first"]))
def test_shares_take_the_nearest_number_of_layers(depth: int, below: int, data: st.DataObject, kind: str) -> None:
    above = data.draw(st.integers(1, below))
    layers = select_layers(f"{kind}:{above}/{below}", depth)
    exact = Fraction(above, below) * depth
    assert len(layers) == 1 or abs(len(layers) - exact) <= Fraction(1, 2)
    assert len(layers) > 1 or exact <= Fraction(3, 2)
    assert layers == select_layers(f"{kind}:{len(layers)}", depth)


def test_shares_of_known_models() -> None:
    for depth, count in ((32, 21), (30, 20), (18, 12), (40, 26), (28, 18), (1, 1)):
        assert len(select_layers("last:21/32", depth)) == count
    assert select_layers("first:1/80", 4) == [0]
    assert select_layers("last:7/7", 5) == [0, 1, 2, 3, 4]


@properties
@given(depth=depths, data=st.data())
def test_indices(depth: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(-depth, depth - 1), min_size=1, max_size=6))
    expected = [layer for layer in range(depth) if layer in indices or layer - depth in indices]
    as_text = ",".join(map(str, indices))
    forms: list[Any] = [indices, tuple(indices), [np.int64(index) for index in indices], np.array(indices), as_text]
    for layers in forms:
        assert select_layers(layers, depth) == expected


@properties
@given(
    signatures=st.lists(st.floats(0, 100), min_size=1, max_size=12, unique=True),
    data=st.data(),
)
def test_signature_takes_the_highest(signatures: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(signatures)))
    chosen = select_layers(f"signature:{count}", len(signatures), dict(enumerate(signatures)))
    assert chosen == sorted(chosen)
    assert sorted((signatures[layer] for layer in chosen), reverse=True) == sorted(signatures, reverse=True)[:count]


@pytest.mark.parametrize(
    "layers",
    [
        *("", "last", "last:", "last:0", "first:-1", "last:1.5", "last:0/4", "first:1/0", "last:1/2/3", "middle:3"),
        *("signature:0", "signature:x", "4,", ",4", "4 5", "1.0", "all:3", "ALL", "last: 3", "--1", "last:3\n"),
        *("at:3", "at:", "at:4/3", "at:5/4", "at:1/0", "at:0.5", "at:-1/4"),
    ],
)
def test_forms_that_are_refused(layers: str) -> None:
    message = re.escape(
        f"layers is '{layers}', but it must be one of: all; last:L, first:L or signature:L, with L at least 1 or a p"
    )
    calls: list[Callable[[str], object]] = [lambda text: select_layers(text, 9), parse_layers]
    for call in calls:
        with pytest.raises(SettingError, match=message + ".* indices such as 4,5,-1"):
            call(layers)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("last:10", "layers 'last:10' selects 10 layers, but the model has 9"),
        ("first:4/3", "layers 'first:4/3' selects 12 layers, but the model has 9"),
        ("signature:10", "layers 'signature:10' selects 10 layers, but the model has 9"),
        ("3,9", "layer 9 is outside the model, which has layers 0 to 8"),
        ([3, -10], "layer -10 is outside the model, which has layers 0 to 8"),
    ],
)
def test_layers_that_the_model_does_not_have(layers: str | Sequence[int], message: str) -> None:
    parse_layers(layers)  # the depth is not known yet
    with pytest.raises(SiteError, match=re.escape(message)):
        select_layers(layers, 9, dict.fromkeys(range(9), 1.0))


@pytest.mark.parametrize(
    ("share", "depth", "layer"),
    [("13/32", 32, 13), ("13/32", 30, 12), ("0/4", 30, 0), ("1/80", 4, 0), ("32/32", 32, 31), ("31/32", 12, 11)],
)
def test_the_single_layer_at_a_share_of_the_depth(share: str, depth: int, layer: int) -> None:
    assert select_layers(f"at:{share}", depth) == [layer]


@properties
@given(depth=depths, below=st.integers(1, 40), data=st.data())
def test_the_single_layer_is_the_nearest_of_the_model(depth: int, below: int, data: st.DataObject) -> None:
    above = data.draw(st.integers(0, below))
    (layer,) = select_layers(f"at:{above}/{below}", depth)
    distance = [abs(Fraction(above, below) * depth - other) for other in range(depth)]
    assert distance[layer] == min(distance)


def test_ranges_are_indices() -> None:
    assert select_layers(range(2, 8, 3), 9) == [2, 5]


@pytest.mark.parametrize("layers", [[], (), range(0), np.array([], dtype=np.int64)])
def test_no_layers(layers: Any) -> None:
    with pytest.raises(SettingError, match="layers is empty; name at least one layer, or 'all'"):
        select_layers(layers, 9)


@pytest.mark.parametrize("layers", [[1.0], [True], ["1"], [None], np.array([0.5])])
def test_indices_that_are_no_integers(layers: Any) -> None:
    with pytest.raises(SettingError, match=r"^layers is \[.*\], but every index must be an integer$"):
        select_layers(layers, 9)
