"""``sealign inspect``: what an edit does and where it comes from."""

from __future__ import annotations

from sealign.cli import options
from sealign.cli.app import app


@app.command()
def inspect(edit: options.Edit, json: options.Json = False) -> None:
    """Show an edit's method, settings, provenance, and what was fitted at each layer.

    The edit's files are checked in full; the model is not needed.
    """
    import dataclasses

    from sealign.cli.display import print_json, print_record
    from sealign.methods.edit_sources import load_edit_source

    parts = load_edit_source(edit).parts
    if json:
        found = [dataclasses.asdict(part.record) | {"hash": part.hash} for part in parts]
        print_json(found[0] if len(found) == 1 else found)
        return
    for part in parts:
        print_record(part)
