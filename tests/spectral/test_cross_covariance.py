from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sealign.errors import ActivationError
from sealign.spectral.cross_covariance import CrossCovariance


def _direct(x: torch.Tensor, y: torch.Tensor, centered: bool) -> torch.Tensor:
    x, y = x.double(), y.double()
    if centered:
        x, y = x - x.mean(0), y - y.mean(0)
    return x.T @ y / len(x)


def _dense(covariance: CrossCovariance) -> torch.Tensor:
    return covariance.compute().multiply(torch.eye(covariance.width, dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@example(n=4, d=4, cuts=[2], centered=False, seed=0)
@given(
    n=st.integers(1, 14),
    d=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 14), max_size=4),
    centered=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_batches_give_the_covariance_of_all_rows(
    n: int, d: int, cuts: list[int], centered: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator) + 3
    y = torch.randn(n, d, generator=generator) - 1
    covariance = CrossCovariance(d, centered=centered)
    for start, end in itertools.pairwise(sorted({0, n, *(min(cut, n) for cut in cuts)})):
        covariance.update(x[start:end], y[start:end])
    assert covariance.count == n
    torch.testing.assert_close(_dense(covariance), _direct(x, y, centered), rtol=1e-10, atol=1e-10)
    # Rows are stored as long as there are fewer of them than features.
    assert (covariance.compute().dense is None) == (n < d)


@pytest.mark.parametrize("counts", [(1, 0), (2, 1), (3, 2), (9, 0), (6, 7)])
@pytest.mark.parametrize("centered", [False, True])
def test_combined_workers_all_have_the_covariance_of_all_rows(counts: tuple[int, int], centered: bool) -> None:
    x, y = torch.randn(sum(counts), 5) + 3, torch.randn(sum(counts), 5)
    workers = [CrossCovariance(5, centered=centered) for _ in counts]
    for worker, rows in zip(workers, (slice(None, counts[0]), slice(counts[0], None)), strict=True):
        if x[rows].shape[0]:
            worker.update(x[rows], y[rows])
    given: list[torch.Tensor] = [torch.empty(0)] * 2
    barrier = Barrier(2, timeout=30)

    def exchange(rank: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        given[rank] = tensor
        barrier.wait()
        both = [part.clone() for part in given]
        barrier.wait()
        return both

    def combine(rank: int) -> None:
        workers[rank].combine(
            lambda tensor: torch.stack(exchange(rank, tensor)).sum(0), lambda rows: torch.cat(exchange(rank, rows))
        )

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(combine, range(2)))
    for worker in workers:
        assert worker.count == sum(counts)
        assert (worker.compute().dense is None) == (sum(counts) < 5)
        torch.testing.assert_close(_dense(worker), _direct(x, y, centered), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_restored_state_continues_as_if_nothing_had_happened(mapped: bool) -> None:
    x, y = torch.randn(7, 4), torch.randn(7, 4)
    first = CrossCovariance(4, centered=True)
    first.update(x[:3], y[:3])
    state = first.state()
    out = torch.zeros(4, 4, dtype=torch.float64) if mapped else None
    second = CrossCovariance(4, centered=True, out=out)
    second.update(y, x)  # is replaced
    second.restore(state)
    first.update(x, y)  # does not reach what was restored
    second.update(x[3:], y[3:])
    torch.testing.assert_close(_dense(second), _direct(x, y, True), rtol=1e-10, atol=1e-10)
    assert (second.count, out is None or second.state()["products"] is out) == (7, True)


def test_memory_does_not_grow_with_rows() -> None:
    covariance = CrossCovariance(5)
    for _ in range(100):
        covariance.update(torch.randn(3, 5), torch.randn(3, 5))
    assert covariance._rows == []


def test_refusals_name_the_shapes() -> None:
    covariance = CrossCovariance(4)
    with pytest.raises(ActivationError, match=r"\(b, 4\), got \(2, 3\) and \(2, 3\)"):
        covariance.update(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ActivationError, match="at least one row"):
        covariance.compute()
