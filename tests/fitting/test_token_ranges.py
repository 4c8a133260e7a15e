"""Means over ranges of tokens against sums over the whole sequences."""

from __future__ import annotations

import pytest
import torch

from sealign.fitting.sequences import Read
from sealign.fitting.token_ranges import TokenRanges


@pytest.mark.parametrize("shared", [0, 4])
@pytest.mark.parametrize("single", [False, True])
def test_against_the_whole_sequences(shared: int, single: bool) -> None:
    """Ranges inside the shared prefix, across its end, and behind it; some rows are read twice, and not in order."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(3, 9, 5, generator=generator)
    whole[:, :shared] = whole[0, :shared].clone()
    ranges = [(2, 0, 9), (0, 3, 4), (0, 2, 7), (1, 5, 9), (2, 1, 3)]
    if single:
        ranges = [(row, stop - 1, stop) for row, _, stop in ranges]
    reads = [(row, Read(0, number, start, stop)) for number, (row, start, stop) in enumerate(ranges)]
    found = TokenRanges.of(reads, shared).means(whole[:, shared:], whole[0, :shared])
    expected = torch.stack([whole[row, start:stop].double().mean(0) for row, start, stop in ranges])
    if single:
        assert torch.equal(found.double(), expected)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_values_are_read_in_float32() -> None:
    hidden = torch.full((1, 300, 2), 1.01, dtype=torch.bfloat16)
    found = TokenRanges.of([(0, Read(0, 0, 0, 300))], 0).means(hidden, torch.zeros(0, 2))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, hidden[0, :1].float())
