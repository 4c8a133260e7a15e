"""``sealign cache``: what is kept of converted models and unfinished work, and its removal."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from sealign.cli import option_values, options
from sealign.cli.app import Commands, add_group
from sealign.cli.consoles import messages, output

if TYPE_CHECKING:
    from sealign.cache import CacheEntry

caches: Commands = add_group("cache", "List or remove converted models and unfinished work.")


@caches.command("list")
def list_entries(json: options.Json = False) -> None:
    """List what is in the cache, by kind, with sizes.

    The cache is the folder of the environment variable SEALIGN_CACHE, or the user's cache folder.
    """
    from sealign.cache import cache_dir, cache_entries
    from sealign.cli.display import print_json

    entries = cache_entries()
    if json:
        print_json({"folder": str(cache_dir()), "entries": _as_data(entries)})
        return
    output.print(_table(f"Cache in {cache_dir()}", entries))


@caches.command()
def clear(
    kinds: Annotated[
        str,
        typer.Option(
            "--kinds",
            metavar="NAME,NAME,...",
            help="What to remove: models (converted from GGUF), fits (unfinished ones), adapters (of servers), offload "
            "(weights of models larger than memory), history (of chats).",
        ),
    ] = "models,fits",
    json: options.Json = False,
) -> None:
    """Remove what is in the cache, except for what a process uses.

    Models are converted again when they are needed, and interrupted fits begin anew. End servers before you remove
    their adapters, and processes that use models larger than memory before their weights.
    """
    from sealign.cache import clear_cache
    from sealign.cli.display import print_json

    removed, used = clear_cache(option_values.names(kinds))
    if json:
        print_json({"removed": _as_data(removed), "in_use": _as_data(used)})
        return
    output.print(_table("Removed", removed))
    for entry in used:
        messages.print(f"'{entry.path}' is in use and was left.", markup=False, soft_wrap=True)


def _table(title: str, entries: Sequence[CacheEntry]) -> Table:
    import datetime

    from rich.filesize import decimal

    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = f"{decimal(sum(entry.size for entry in entries))} in all"
    for name in ("kind", "name", "size", "last changed"):
        table.add_column(name, justify="right" if name == "size" else "left", overflow="fold")
    for entry in entries:
        day = datetime.datetime.fromtimestamp(entry.changed).date().isoformat()
        table.add_row(entry.kind, entry.path.name, decimal(entry.size), day)
    return table


def _as_data(entries: Sequence[CacheEntry]) -> list[dict[str, object]]:
    return [dataclasses.asdict(entry) | {"path": str(entry.path)} for entry in entries]
