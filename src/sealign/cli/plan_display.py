"""The estimate of a fit, for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from sealign.fitting.plan import FitPlan


def plan_table(plan: FitPlan) -> Table:
    """Return the table of an estimate: model, demonstrations, activations, memory and times."""
    table = Table(show_header=False, title="Estimate of the fit", title_justify="left")
    active = f", {_count(plan.active_parameters)} active" if plan.active_parameters < plan.parameters else ""
    rows = {
        "model": f"{_count(plan.parameters)} parameters{active}, {size(plan.model_bytes)}",
        "demonstrations": f"{plan.demonstrations}, {plan.tokens} tokens to run",
        "layers": f"{plan.layers} of width {plan.width}",
        "activations": f"{size(plan.kept_bytes)} as {plan.keep.kept}, {_place(plan)}",
        "peak memory": size(plan.peak_bytes),
        "edit": f"{size(plan.factor_bytes)} per direction, over all layers",
        "throughput": f"{plan.tflops:.3g} TFLOP/s",
        "collection": duration(plan.collection_seconds),
        "decomposition": duration(plan.decomposition_seconds),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def plan_line(plan: FitPlan) -> str:
    """Return the estimate of a fit in one line."""
    return (
        f"{plan.demonstrations} demonstrations, {plan.tokens} tokens: about {duration(plan.collection_seconds)} to "
        f"collect and {duration(plan.decomposition_seconds)} to decompose {plan.layers} layers; activations take "
        f"{size(plan.kept_bytes)} as {plan.keep.kept}, {_place(plan)}"
    )


def _place(plan: FitPlan) -> str:
    return "in memory" if plan.keep.place == "memory" else "in a memory-mapped file"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"


def size(count: float) -> str:
    """Return a number of bytes in a readable unit.

    Example:
        >>> size(134_515_008 * 4)
        '513 MiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count < 100 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def duration(seconds: float) -> str:
    """Return a number of seconds in a readable unit.

    Example:
        >>> [duration(value) for value in (0.04, 3.21, 100, 9000)]
        ['0.04 s', '3.2 s', '1.7 min', '2.5 h']
    """
    if seconds < 60:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.2g} min" if seconds < 5400 else f"{seconds / 3600:.3g} h"
