"""Shared by the benchmarks: interleaved timing of arms, peak memory, the machine, and a table with its JSON."""

from __future__ import annotations

import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def interleave(arms: Mapping[str, Callable[[], object]], rounds: int, *, calls: int = 1) -> dict[str, list[float]]:
    """Time each arm once per round, in random order, and return the seconds of each arm by round.

    The time of an arm in a round is the median of ``calls`` calls. Each arm is called once before the first round.
    """
    for run in arms.values():
        run()
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        names = list(arms)
        order.shuffle(names)
        for name in names:
            times = []
            for _ in range(calls):
                started = time.perf_counter()
                arms[name]()
                times.append(time.perf_counter() - started)
            seconds[name].append(statistics.median(times))
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]], arm: str, to: str) -> list[float]:
    """Return the ratio of the times of two arms in each round."""
    return [own / other for own, other in zip(seconds[arm], seconds[to], strict=True)]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return the median with the lowest and highest value, as text."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def reset_peak() -> int:
    """Reset the peak memory of this process, and return its memory in bytes; on Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Return the peak memory of this process since ``reset_peak``, in bytes."""
    return _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def machine(*packages: str) -> dict[str, Any]:
    """Return the processor, threads and versions that the figures depend on."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("sealign", "torch", *packages)},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def report(
    title: str, rows: Sequence[Mapping[str, str]], record: Mapping[str, Any], file: Path | None, *packages: str
) -> None:
    """Print a table, and write the record with the machine to a JSON file if one is given."""
    from rich.console import Console
    from rich.table import Table

    found = machine(*packages)
    table = Table(title=title, caption=", ".join(f"{name} {value}" for name, value in found.items()))
    for number, column in enumerate(rows[0]):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)
    if file is not None:
        file.write_text(json.dumps({"machine": found, **record}, indent=2) + "\n")
