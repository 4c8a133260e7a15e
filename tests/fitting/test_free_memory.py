"""Free memory under the limits of control groups, in folders that look like those of the kernel."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from sealign.fitting import free_memory as module
from sealign.fitting.activation_store import Keep, choose_keep, rows_bytes
from sealign.fitting.free_memory import free_memory

GIB = 2**30


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The mount of the control groups of a process on a machine with 100 GiB free."""
    monkeypatch.setattr(module, "MOUNT", tmp_path / "cgroup")
    monkeypatch.setattr(module, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 100 * GIB}))
    return tmp_path / "cgroup"


def _group(folder: Path, limit: str | int, used: int, cache: int, *, version: int = 2) -> None:
    names = [("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")]
    names += [("memory.max", "memory.current", "inactive_file")]
    limit_name, usage_name, cache_name = names[version - 1]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / usage_name).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{cache_name} {cache}\nactive_file 7\n")


def _member(groups: Path, text: str) -> None:
    (groups.parent / "membership").write_text(text)


def test_no_control_groups(groups: Path) -> None:
    assert free_memory() == 100 * GIB
    _member(groups, "0::/\n")
    assert free_memory() == 100 * GIB


def test_version_2_counts_the_tightest_parent_and_not_the_cache(groups: Path) -> None:
    _group(groups / "job" / "step", "max", 3 * GIB, GIB)
    _group(groups / "job", 8 * GIB, 3 * GIB, GIB)
    _member(groups, "0::/job/step\n")
    assert free_memory() == 6 * GIB
    _group(groups / "job" / "step", 5 * GIB, 3 * GIB, GIB)
    assert free_memory() == 3 * GIB
    _group(groups / "job" / "step", 2 * GIB, 3 * GIB, 0)  # above its limit
    assert free_memory() == 0


def test_version_1_inside_a_container_that_sees_the_path_of_the_host(groups: Path) -> None:
    _group(groups / "memory", 4 * GIB, 2 * GIB, GIB, version=1)
    _member(groups, "12:cpu,cpuacct:/docker/abc\n7:memory:/docker/abc\n")
    assert free_memory() == 3 * GIB
    _group(groups / "memory", 2**63 - 4096, 2 * GIB, GIB, version=1)  # no limit
    assert free_memory() == 100 * GIB


def test_workers_of_a_machine_share_it(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _group(groups, 8 * GIB, 0, 0)
    _member(groups, "0::/\n")
    size = rows_bytes(1, [GIB // 4])  # 3 GiB
    assert choose_keep(1, [GIB // 4]) == Keep("rows", "memory")
    assert size <= free_memory() / 2
    monkeypatch.setattr("sealign.fitting.workers.rank_and_size", lambda: (1, 6))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_memory() == 4 * GIB
    assert choose_keep(1, [GIB // 4]) == Keep("rows", "disk")
