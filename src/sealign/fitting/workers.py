"""Fit with several processes, started by ``torchrun`` or ``accelerate launch``.

``torch.distributed`` is used directly. The helpers of Accelerate work on a state that belongs to the whole process: on
CPUs, one ``PartialState()`` made earlier by another library turns all of them silently into operations on this process
alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, distributed
from torch.nn.functional import pad

from sealign.errors import WorkerError

Item = TypeVar("Item")

_SHARING = ContextVar("sharing", default=False)
"""True inside ``worker_group``. A process group alone is no sign: a tensor-parallel model has one too."""


def rank_and_size() -> tuple[int, int]:
    """Return the rank of this process and the number of workers; (0, 1) outside ``worker_group``."""
    return (distributed.get_rank(), distributed.get_world_size()) if _SHARING.get() else (0, 1)


def workers_on_this_machine() -> int:
    """Return the number of workers that share the memory of this machine; 1 outside ``worker_group``."""
    size = rank_and_size()[1]
    return size if size == 1 else int(os.environ.get("LOCAL_WORLD_SIZE", size))


@contextmanager
def worker_group() -> Iterator[bool]:
    """Share the work of a block among the processes of a launcher, and yield whether this is the first process.

    Without a launcher the block runs in this process alone. An existing process group is used. A new one has the
    backend of the accelerator (NCCL for CUDA), or Gloo on CPUs.

    Raises:
        WorkerError: The processes cannot connect.
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
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        distributed.init_process_group(
            distributed.get_default_backend_for_device("cpu" if accelerator is None else accelerator)
        )
    except (RuntimeError, ValueError) as error:
        raise WorkerError(
            f"one of {size} workers cannot connect to the others ({error}); start them with torchrun or accelerate "
            "launch"
        ) from error


def own_share(items: Sequence[Item]) -> Sequence[Item]:
    """Return the items of this worker: items rank, rank + size, rank + 2 size and so on.

    Args:
        items: The same sequence on all workers.

    Example:
        >>> own_share([1, 2, 3])
        [1, 2, 3]
    """
    rank, size = rank_and_size()
    return items if size == 1 else items[rank::size]


def sum_over_workers(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all workers; the tensor itself if there is one worker.

    Args:
        tensor: Tensor of the same shape on all workers.

    Raises:
        WorkerError: Another worker has exited.
    """
    if rank_and_size()[1] == 1:
        return tensor
    total = tensor.to(_device(), copy=True)
    with _peers():
        distributed.all_reduce(total)
    return total.to(tensor.device)


def gather_objects(own: Item) -> list[Item]:
    """Return the objects of all workers, by rank.

    Args:
        own: Object of this worker; it is pickled.

    Raises:
        WorkerError: Another worker has exited.

    Example:
        >>> gather_objects({3: "c"})
        [{3: 'c'}]
    """
    size = rank_and_size()[1]
    found: list[Item] = [own] * size
    if size > 1:
        with _peers():
            distributed.all_gather_object(found, own)
    return found


def gather_rows(rows: Float[Tensor, "b d"]) -> Float[Tensor, "n d"]:
    """Return the rows of all workers in the order of the items that ``own_share`` distributed.

    Args:
        rows: Rows of this worker's items, (b, d); b may be smaller by one on later workers.

    Raises:
        WorkerError: Another worker has exited.
    """
    if rank_and_size()[1] == 1:
        return rows
    counts = gather_objects(rows.shape[0])
    padded = pad(rows.to(_device()), (0, 0, 0, max(counts) - rows.shape[0]))
    parts = [torch.empty_like(padded) for _ in counts]
    with _peers():
        distributed.all_gather(parts, padded)
    # Row i is row i // size of worker i % size, and only the last row of a worker can be padding.
    return torch.stack(parts, dim=1).flatten(0, 1)[: sum(counts)].to(rows.device)


@contextmanager
def _peers() -> Iterator[None]:
    """Wrap a collective operation; raise WorkerError if a peer has exited."""
    try:
        yield
    except RuntimeError as error:
        raise WorkerError(
            "another worker has exited, so the job cannot continue; see its error message, and run the command again "
            "to continue from the finished batches"
        ) from error


def _device() -> torch.device:
    """Return the device whose tensors the process group exchanges."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or distributed.get_backend() == "gloo":
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
