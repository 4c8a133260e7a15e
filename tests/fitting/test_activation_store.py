from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealign.errors import SettingError
from sealign.fitting.activation_store import Keep, choose_keep, rows_bytes, sums_bytes

WIDTHS = st.lists(st.integers(1, 9000), min_size=1, max_size=90)


@given(st.integers(2, 10**7), WIDTHS, st.integers(1, 10**13))
def test_what_needs_the_least_is_kept_where_there_is_room(count: int, widths: list[int], memory: int) -> None:
    found = choose_keep(count, widths, free_memory=memory)
    rows, sums = rows_bytes(count, widths), sums_bytes(widths)
    assert {"rows": rows, "sums": sums}[found.kept] == min(rows, sums)
    assert (found.place == "memory") is (2 * min(rows, sums) <= memory)


@given(st.integers(2, 10**7), WIDTHS, st.integers(1, 10**13))
def test_rows_are_kept_for_a_method_that_needs_them(count: int, widths: list[int], memory: int) -> None:
    found = choose_keep(count, widths, needs_rows=True, free_memory=memory)
    assert found == Keep("rows", "memory" if 2 * rows_bytes(count, widths) <= memory else "disk")


def test_the_estimates_are_those_of_the_arrays() -> None:
    assert rows_bytes(7, [5, 3]) == 7 * (5 + 3) * 3 * 4
    assert sums_bytes([5, 3]) == (25 + 9) * 2 * 8


def test_the_system_is_asked_for_free_memory() -> None:
    assert choose_keep(4, [8]) == Keep("rows", "memory")
    assert choose_keep(10**12, [2**20]).place == "disk"


@pytest.mark.parametrize(("settings", "words"), [({"kept": "row"}, "unknown kept 'row'"), ({"place": "disc"}, "disk")])
def test_unknown_values(settings: dict[str, str], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        Keep(**settings)  # type: ignore[arg-type]
