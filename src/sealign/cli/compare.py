"""``sealign compare``: compare two evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sealign.cli import options
from sealign.cli.app import app
from sealign.cli.consoles import messages, output


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Folder or results.json of an evaluation.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Folder or results.json of another evaluation.")],
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Compare two evaluations of the same tasks, item by item."""
    from sealign.cli.display import print_json
    from sealign.cli.evaluation_display import comparison_tables, comparisons_as_data
    from sealign.evaluation.comparison import compare_results
    from sealign.evaluation.results import Results

    ours, theirs = Results.load(first), Results.load(second)
    if ours == theirs:
        messages.print("[yellow]note:[/] A and B hold the same results, so that every difference is 0.")
    comparisons = compare_results(ours, theirs, seed=seed)
    if json:
        print_json(comparisons_as_data(comparisons))
        return
    for table in comparison_tables(comparisons, str(first), str(second)):
        output.print(table)
