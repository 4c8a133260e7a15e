"""Tables and progress bars."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sealign.cli.app import messages, output

if TYPE_CHECKING:
    from sealign.edits.record import EditRecord


def track(items: Iterable[Any], what: str, how_many: int) -> Iterable[Any]:
    """Return the items, showing a progress bar on standard error, if that is a terminal, while they are taken."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as progress:
        yield from progress.track(items, total=how_many, description=what)


def print_json(data: Any) -> None:
    """Print data as JSON on standard output."""
    import json

    output.out(json.dumps(data, indent=2, allow_nan=False), highlight=False)


def print_saved(record: EditRecord, folder: Path) -> None:
    """Print where an edit was saved, and lines of Python and of the shell that use it, ready to be copied."""
    import json
    import shlex

    model, edit = (json.dumps(str(text), ensure_ascii=False) for text in (record.model.id, folder))
    lines = f"""Saved to {folder}. Load it with:

import sealign
model, tokenizer = sealign.load_model({model})
edit = sealign.Edit.from_pretrained({edit})
with sealign.apply_edit(model, edit):
    ...  # model.generate(...)

or talk to it:

sealign chat --edit {shlex.quote(str(folder))}"""
    output.print(lines, markup=False, soft_wrap=True)


def layer_table(record: EditRecord) -> Table:
    """Return the table of an edit's layers: ranks, explained variance, relative change, signature."""
    table = Table(title=escape(f"Edited layers: {_modules(record)}"), title_justify="left")
    for name in ("layer", "rank +", "rank -", "variance +", "variance -", "change", "signature"):
        table.add_column(name, justify="right")
    for layer, entry in record.layers.items():
        table.add_row(
            layer,
            str(entry.rank_positive),
            str(entry.rank_negative),
            f"{entry.explained_variance_positive:.4f}",
            f"{entry.explained_variance_negative:.4f}",
            f"{entry.relative_change:.4f}",
            f"{entry.signature:.3f}",
        )
    return table


def _modules(record: EditRecord) -> str:
    """Name the edited modules by pattern, once for all layers that follow it."""
    layers: dict[str, list[str]] = {}
    for layer, entry in record.layers.items():
        pattern = ".".join("{layer}" if part == layer else part for part in entry.module.split("."))
        layers.setdefault(pattern, []).append(layer)
    if len(layers) == 1:
        return next(iter(layers))
    return "; ".join(f"{pattern} ({', '.join(which)})" for pattern, which in layers.items())


def settings_table(record: EditRecord) -> Table:
    """Return the table of an edit's settings and provenance."""
    table = Table(show_header=False, title="Edit", title_justify="left")
    settings, model = record.settings, record.model
    rows = {
        "base model": model.id,
        "revision": model.revision or "not known",
        "site": settings.site,
        "combine": settings.combine,
        "normalization": settings.normalization,
        "strength": f"{settings.strength:g}",
        "feature map": settings.feature_map,
        "centered": "yes" if settings.centered else "no",
        "demonstrations": f"{record.demonstrations_count} (SHA-256 {record.demonstrations_hash[:16]})",
        "tensors": f"SHA-256 {record.tensors_hash[:16]}" if record.tensors_hash else "not saved yet",
        "versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table


def answers_table(prompts: Sequence[str], base: Sequence[str], edited: Sequence[str]) -> Table:
    """Return prompts with the base and the edited answer side by side."""
    table = Table(title="Answers", title_justify="left", show_lines=True, expand=True)
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("base", ratio=3, overflow="fold")
    table.add_column("edited", ratio=3, overflow="fold")
    for row in zip(prompts, base, edited, strict=True):
        table.add_row(*(escape(cell) for cell in row))
    return table
