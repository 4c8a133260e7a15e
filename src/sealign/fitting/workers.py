"""Several processes that share one job, as ``torchrun`` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor, distributed

from sealign.errors import WorkerError

Item = TypeVar("Item")

_SHARING = ContextVar("sharing", default=False)
"""Whether this is inside ``worker_group``: a tensor-parallel model has a process group too, and runs all on each."""


def rank_and_size() -> tuple[int, int]:
    """Return the number of this process and how many share its work; (0, 1) outside ``worker_group``."""
    return (distributed.get_rank(), distributed.get_world_size()) if _SHARING.get() else (0, 1)


@contextmanager
def worker_group() -> Iterator[bool]:
    """Share the work of this block among the processes that a launcher started, and yield whether this is the first.

    Outside a launcher there is nothing to join, and a group that there is already is used. The backend is NCCL where
    CUDA is, else gloo.

    Raises:
        WorkerError: the others did not come.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield True
        return
    joined = not distributed.is_initialized()
    if joined:
        _join(size)
    sharing = _SHARING.set(True)
    try:
        yield distributed.get_rank() == 0
    finally:
        _SHARING.reset(sharing)
        if joined:
            distributed.destroy_process_group()


def _join(size: int) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    except (RuntimeError, ValueError) as error:
        raise WorkerError(
            f"this worker of {size} cannot join the others ({error}); start them with torchrun"
        ) from error


def own_share(items: Sequence[Item]) -> Sequence[Item]:
    """Return this worker's part of a sequence: every size-th from its rank on.

    Example:
        >>> own_share([1, 2, 3])
        [1, 2, 3]
    """
    rank, size = rank_and_size()
    return items if size == 1 else items[rank::size]


def sum_everywhere(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all workers; the tensor itself where there is one."""
    if rank_and_size()[1] == 1:
        return tensor
    total = tensor.to(_device(), copy=True)
    with _together():
        distributed.all_reduce(total)
    return total.to(tensor.device)


def gather_objects(own: Item) -> list[Item]:
    """Return what each worker gives, in their order, on all of them.

    Example:
        >>> gather_objects({3: "c"})
        [{3: 'c'}]
    """
    size = rank_and_size()[1]
    found: list[Item] = [own] * size
    if size > 1:
        with _together():
            distributed.all_gather_object(found, own)
    return found


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all workers in the order of the whole, of which ``own_share`` gave row i to worker i % size.

    Args:
        rows: (b, d); b may differ by one between workers, as ``own_share`` leaves it.
    """
    _, size = rank_and_size()
    if size == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.long, device=_device()) for _ in range(size)]
    with _together():
        distributed.all_gather(counts, torch.tensor([rows.shape[0]], device=_device()))
    longest = max(int(count) for count in counts)
    padded = torch.zeros(longest, *rows.shape[1:], dtype=rows.dtype, device=_device())
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in range(size)]
    with _together():
        distributed.all_gather(parts, padded)
    whole = torch.stack(parts, dim=1).flatten(0, 1)
    present = torch.stack([torch.arange(longest, device=_device()) < count for count in counts], dim=1).flatten()
    return whole[present].to(rows.device)


@contextmanager
def _together() -> Iterator[None]:
    """What all workers take part in; the loss of one is the end of the others."""
    try:
        yield
    except RuntimeError as error:
        raise WorkerError(
            "another worker of this job ended, so this one cannot go on; what it says is above or below, and the same "
            "command goes on from the batches that are finished"
        ) from error


def _device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if distributed.get_backend() == "nccl"
        else torch.device("cpu")
    )
