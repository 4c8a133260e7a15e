"""Free memory of a process, within the limit of its container and beside the other workers of its machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

from sealign.fitting.workers import workers_on_this_machine

MOUNT = Path("/sys/fs/cgroup")
"""Folder of the control groups, which limit the memory of containers and batch jobs."""

MEMBERSHIP = Path("/proc/self/cgroup")
"""File with the control groups of this process."""


def free_memory() -> int:
    """Return the memory that this process may use, in bytes.

    It is the memory available on the system, or what the limits of the process's control groups leave if that is less,
    divided by the number of workers on this machine.

    Example:
        >>> free_memory() > 0
        True
    """
    available: int = psutil.virtual_memory().available
    return min([available, *_rooms()]) // workers_on_this_machine()


def _rooms() -> Iterator[int]:
    """Yield the memory that is left in each control group of this process, of version 1 or 2, and in their parents."""
    lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines() if MEMBERSHIP.is_file() else []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            base, limit, usage, cache = MOUNT, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base = MOUNT / "memory"
            limit, usage, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # Inside a container the path may be that on the host, so that only the root of the mount exists.
        folder = base / group.lstrip("/")
        for place in (folder, *folder.parents):
            if place.is_relative_to(base) and (place / limit).is_file():
                allowed = (place / limit).read_text(encoding="utf-8").strip()
                if allowed != "max":
                    yield max(0, int(allowed) - _used(place, usage, cache))


def _used(place: Path, usage: str, cache: str) -> int:
    """Return the memory used in a control group, without the file cache that the kernel would give up."""
    lines = (place / "memory.stat").read_text(encoding="utf-8").splitlines()
    statistics = dict(line.split() for line in lines)
    return int((place / usage).read_text(encoding="utf-8")) - int(statistics.get(cache, 0))
