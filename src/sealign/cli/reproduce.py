"""``sealign reproduce``: the paper's tables and figures, made again for any model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sealign.cli import options
from sealign.cli.app import app, messages, output, quiet_harness, recorded_command, require_extra


@app.command()
def reproduce(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="Such as table-bbq or figure-tsne; all makes every one.")
    ],
    output_folder: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Folder for all targets, each in a folder of its own.")
    ],
    model: options.Model = None,
    models: Annotated[
        list[str] | None,
        typer.Option("--also", metavar="MODEL", help="A further model for the targets that compare models."),
    ] = None,
    data_dir: options.DataDir = None,
    limit: options.TaskLimit = None,
    learn_from: Annotated[
        int | None,
        typer.Option(
            "--learn-from",
            min=2,
            metavar="N",
            help=r"Demonstrations of each source, at most. \[default: the paper's 2000 and 1000]",
        ),
    ] = None,
    amateur: Annotated[
        str | None,
        typer.Option(
            "--amateur", metavar="MODEL", help="A smaller model of the same tokenizer, for contrastive decoding."
        ),
    ] = None,
    judge: options.JudgeModel = None,
    judge_url: options.JudgeUrl = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Make the tables and figures of the paper again, for any model.

    Each target has a folder with CSV, LaTeX, figures and a page of HTML; values that were not computed are shown as
    missing, with the reason. Run the same command again to go on after an interruption.
    """
    require_extra("eval", "lm_eval", "datasets", "matplotlib", "yaml")
    require_extra("methods", "peft", "sklearn")
    quiet_harness()
    from sealign.cli.display import track
    from sealign.cli.judging import load_judge
    from sealign.errors import SealignError
    from sealign.models.embedded_model import EMBEDDED
    from sealign.reproduce.table_format import Table, to_markdown
    from sealign.reproduce.targets import chosen_targets
    from sealign.reproduce.targets import reproduce as run
    from sealign.reproduce.workbench import PAPERS, ReproduceConfig

    chosen_targets(target)
    config = ReproduceConfig(
        output=output_folder,
        model=model or EMBEDDED,
        models=tuple(models or ()),
        data_dir=data_dir,
        limit=limit,
        demonstrations={source: min(count, learn_from or count) for source, count in PAPERS.items()},
        amateur=amateur,
        judge=load_judge(judge, judge_url, dtype, device),
        seed=seed,
        dtype=dtype,
        device=device,
    )
    failed = []
    for name, result in run(target, config, command=recorded_command(), track=track):
        if isinstance(result, SealignError):
            failed.append(name)
            messages.print(f"[bold red]error:[/] {name}: ", end="")
            messages.print(str(result), markup=False, soft_wrap=True)
            continue
        output.print(
            f"{name}: {output_folder / name}/index.html{' (finished before)' if result is None else ''}", markup=False
        )
        if isinstance(result, Table) and target != "all":
            output.print(to_markdown(result), markup=False, soft_wrap=True)
    if failed:
        raise typer.Exit(2)
