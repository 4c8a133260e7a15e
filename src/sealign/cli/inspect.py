"""``sealign inspect``: what an edit is and where it comes from."""

from __future__ import annotations

from sealign.cli import options
from sealign.cli.app import app, output


@app.command()
def inspect(edit: options.Edit, json: options.Json = False) -> None:
    """Show an edit's ranks, explained variance, relative change, signature and provenance.

    The edit's files are checked in full; the model is not needed.
    """
    import dataclasses

    from sealign.cli.display import layer_table, print_json, settings_table
    from sealign.edits.edit import Edit

    loaded = Edit.from_pretrained(edit)
    if json:
        print_json(dataclasses.asdict(loaded.record) | {"hash": loaded.hash})
        return
    output.print(settings_table(loaded.record), layer_table(loaded.record))
