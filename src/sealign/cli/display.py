"""Tables and progress bars."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sealign.cli.consoles import messages, output
from sealign.cli.plan_display import duration

if TYPE_CHECKING:
    from sealign.edits.intervention import Intervention
    from sealign.edits.record import EditRecord
    from sealign.evaluation.answers import Answers

LONGEST_SETTING = 60
"""Largest number of characters of a setting that a table shows."""

_HEADINGS = {
    "explained_variance_positive": "var. +",
    "explained_variance_negative": "var. -",
    "gate_neutral_share": "gate, text",
    "gate_demonstration_share": "gate, own",
}
"""Headings of statistics; the others are headed by their name."""


def track(items: Iterable[Any], what: str, how_many: int) -> Iterable[Any]:
    """Return the items, showing on standard error how far they are consumed: a bar on a terminal, else a few lines."""
    if not messages.shows_progress:
        yield from items
        return
    if not messages.is_terminal:
        yield from _say_now_and_then(items, what, how_many)
        return
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=messages, transient=True) as progress:
        yield from progress.track(items, total=how_many, description=what)


def _say_now_and_then(items: Iterable[Any], what: str, how_many: int) -> Iterable[Any]:
    start = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - said >= messages.seconds_between_lines:
            left = duration((now - start) / done * (how_many - done))
            messages.say(f"{what}: {done} of {how_many}, about {left} left")
            said = now
        yield item


def print_json(data: Any) -> None:
    """Print data as JSON on standard output: a dataclass as an object of its fields, NaN and infinity as null."""
    import json

    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        data = dataclasses.asdict(data)
    output.out(json.dumps(_finite(data), indent=2, allow_nan=False), highlight=False)


def _finite(data: Any) -> Any:
    """Return data with None for numbers that JSON does not have."""
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def print_record(edit: Intervention) -> None:
    """Print where an edit comes from, its settings, what was fitted at each layer, and a warning if it cancels."""
    from sealign.methods.cancellation import cancellation_warning

    record = edit.record
    output.print(record_table(record, edit.hash), settings_table(record))
    if record.example is not None:
        output.print("First demonstration as the model read it:", style="italic")
        output.print(record.example, markup=False, highlight=False)
    if record.layers:
        output.print(layer_table(record))
    if warning := cancellation_warning(record):
        output.print(escape(warning))


def print_saved(record: EditRecord, folder: Path) -> None:
    """Print where an edit was saved, and lines of Python and of the shell that use it, ready to be copied."""
    import json
    import shlex

    model, edit = (json.dumps(str(text), ensure_ascii=False) for text in (record.model.id, folder))
    model += f', revision="{record.model.revision}"' if record.model.revision else ""
    lines = f"""Saved to {folder}. Load it with:

import sealign
model, tokenizer = sealign.load_model({model})
edit = sealign.load_edit({edit})
with sealign.apply_edit(model, edit):
    ...  # model.generate(...)

or compare answers with and without it:

sealign generate --edit {shlex.quote(str(folder))} --prompt "What happens if you swallow gum?\""""
    output.print(lines, markup=False, soft_wrap=True)


def record_table(record: EditRecord, edit_hash: str) -> Table:
    """Return the table of an edit's method, model and provenance."""
    table = Table(show_header=False, title="Edit", title_justify="left")
    used, holdout = record.demonstrations_hash, record.holdout
    rows = {
        "method": record.method,
        "strength": "" if record.strength is None else f"{record.strength:g}",
        "site": record.site or "",
        "normalization": record.normalization if record.site else "",
        "base model": record.model.id,
        "revision": record.model.revision or "not known",
        "demonstrations": f"{record.demonstrations_count} (SHA-256 {used[:16]})" if used else "none",
        "held out": f"{holdout.fraction:.0%} of the prompts, seed {holdout.seed}" if holdout else "",
        "duration of the fit": f"{record.fit_seconds:.1f} s",
        "hash": f"SHA-256 {edit_hash[:16]}",
        "tensors": f"SHA-256 {record.tensors_hash[:16]}",
        "versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, escape(value))
    return table


def settings_table(record: EditRecord) -> Table:
    """Return the table of the settings of a method and of what else it learned."""
    table = Table(show_header=False, title=f"Settings of {escape(record.method)}", title_justify="left")
    for name, value in flat_settings(record.settings).items():
        text = " ".join(str(value).split())
        shown = text if len(text) <= LONGEST_SETTING else text[: LONGEST_SETTING - 3] + "..."
        table.add_row(escape(name), escape(shown))
    return table


def flat_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted name, without those that are not set.

    Args:
        settings: Settings of a method as they stand in a record.

    Example:
        >>> flat_settings({"rank": None, "training": {"epochs": 3}})
        {'training.epochs': 3}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": item for inner, item in flat_settings(value).items()}
        elif value is not None:
            found[name] = value
    return found


def layer_table(record: EditRecord) -> Table:
    """Return the table of an edit's layers: rank, relative change, and the statistics of its method."""
    table = Table(title=escape(f"Edited layers: {_modules(record)}"), title_justify="left", pad_edge=False)
    names = list(dict.fromkeys(name for entry in record.layers.values() for name in entry.statistics))
    for name in ("layer", "rank", "change", *(_HEADINGS.get(name, name.replace("_", " ")) for name in names)):
        table.add_column(name, justify="right")
    for layer, entry in record.layers.items():
        figures = [_figure(entry.statistics.get(name)) for name in names]
        table.add_row(layer, entry.rank_text, f"{entry.relative_change:.4f}", *figures)
    return table


def _figure(value: float | None) -> str:
    """Return a statistic as text: a whole number as an integer, another with four significant digits."""
    if value is None:
        return ""
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e6 else f"{value:.4g}"


def _modules(record: EditRecord) -> str:
    """Name the edited modules by pattern, once for all layers that follow it."""
    layers: dict[str, list[str]] = {}
    for layer, entry in record.layers.items():
        pattern = ".".join("{layer}" if part == layer else part for part in entry.module.split("."))
        layers.setdefault(pattern, []).append(layer)
    if len(layers) == 1:
        return next(iter(layers))
    return "; ".join(f"{pattern} ({', '.join(which)})" for pattern, which in layers.items())


def print_answers(answers: Sequence[Sequence[Answers]], strengths: Sequence[float | None]) -> None:
    """Print answers: side by side at one strength, otherwise one after another below each prompt.

    Args:
        answers: Answers to the same prompts, for each strength.
        strengths: The strengths.
    """
    first = answers[0]
    if len(answers) == 1:
        prompts, base, edited = zip(*((a.prompt, a.base, a.edited) for a in first), strict=True)
        output.print(answers_table(prompts, base, edited))
        return
    for number, answer in enumerate(first):
        output.print(f"{escape(answer.prompt)}\n", style="bold")
        output.print(f"[bold]base:[/] {escape(answer.base)}\n")
        for strength, found in zip(strengths, answers, strict=True):
            output.print(f"[bold]strength {strength:g}:[/] {escape(found[number].edited)}\n")


def answers_table(prompts: Sequence[str], base: Sequence[str], edited: Sequence[str]) -> Table:
    """Return prompts with the base and the edited answer side by side."""
    table = Table(title="Answers", title_justify="left", show_lines=True, expand=True)
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("base", ratio=3, overflow="fold")
    table.add_column("edited", ratio=3, overflow="fold")
    for row in zip(prompts, base, edited, strict=True):
        table.add_row(*(escape(cell) for cell in row))
    return table
