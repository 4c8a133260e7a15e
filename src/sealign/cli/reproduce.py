"""``sealign reproduce``: the tables and figures of the paper, for any model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sealign.cli import option_values, options
from sealign.cli.app import ERROR_EXIT_CODE, app, quiet_harness, recorded_command, require_extra
from sealign.cli.consoles import messages, output
from sealign.cli.loading import ModelOptions, with_default, with_model_options
from sealign.cli.outputs import UNLESS_EQUAL, say_replaced

PaperLimit = Annotated[
    int | None, with_default(options.DemonstrationsLimit, "2000 or 1000, as in the paper; 200 for behaviours")
]


@app.command()
@with_model_options()
def reproduce(
    model: ModelOptions,
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="Table or figure to reproduce, such as table-bbq; all for those of the paper; or behaviours.",
        ),
    ],
    output_folder: options.Output,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--also",
            metavar="MODEL",
            help="Another model, for the targets that compare models. Repeat the option for several models.",
        ),
    ] = None,
    data_dir: options.DataDir = None,
    limit: options.Limit = None,
    demonstrations_limit: PaperLimit = None,
    behaviours: Annotated[
        str | None,
        typer.Option(
            "--behaviours",
            metavar="SOURCE,SOURCE,...",
            help="Behaviours to run; sources of demonstrations, for the target behaviours, such as truthfulqa or "
            "bundled:positivity. "
            r"\[default: all bundled and named ones]",
        ),
    ] = None,
    amateur: Annotated[
        str | None,
        typer.Option(
            "--amateur", metavar="MODEL", help="Smaller model with the same tokenizer, for contrastive decoding."
        ),
    ] = None,
    judge: options.JudgeModel = None,
    judge_url: options.JudgeUrl = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Reproduce the tables and figures of the paper, or compare methods on behaviours, for any model.

    The output folder contains a folder per target, with CSV, LaTeX, figures and an HTML page. Values that were not
    computed are shown as missing, with the reason. After an interruption, run the same command again to continue.
    """
    require_extra("eval", "lm_eval", "datasets", "matplotlib", "yaml")
    require_extra("methods", "peft", "sklearn")
    quiet_harness()
    from sealign.cli.display import print_json, track
    from sealign.cli.judging import load_judge
    from sealign.errors import SealignError, SettingError
    from sealign.folders import MARK_NAME, check_parent
    from sealign.models.embedded_model import EMBEDDED
    from sealign.reproduce.reproduce_config import ALL_BEHAVIOURS, PAIRS, PAPER_COUNTS, ReproduceConfig
    from sealign.reproduce.table_format import Table, to_markdown
    from sealign.reproduce.targets import USES, chosen_targets, used_by
    from sealign.reproduce.targets import reproduce as run

    given = {"models": models, "behaviours": behaviours, "amateur": amateur, "judge": judge, "limit": limit}
    for setting, value in given.items():
        if not used_by(target, setting):
            option = "--also" if setting == "models" else f"--{setting}"
            option_values.check_absent({option: value}, f"the targets {', '.join(USES[setting])}, not for {target}")
    for name in chosen_targets(target):
        check_parent(output_folder / name / MARK_NAME)
    if model.quantization is not None:
        raise SettingError("--quantization is not supported by sealign reproduce; leave it out")
    config = ReproduceConfig(
        output=output_folder,
        model=model.name or EMBEDDED,
        models=tuple(models or ()),
        data_dir=data_dir,
        limit=limit,
        demonstrations={source: min(count, demonstrations_limit or count) for source, count in PAPER_COUNTS.items()},
        behaviours=ALL_BEHAVIOURS if behaviours is None else option_values.names(behaviours),
        pairs=PAIRS if demonstrations_limit is None else min(PAIRS, demonstrations_limit),
        amateur=amateur,
        judge=load_judge(judge, judge_url, model.dtype, model.device),
        seed=seed,
        dtype=model.dtype,
        device=model.device,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        attn_implementation=model.attn_implementation,
    )
    if overwrite:
        for name in chosen_targets(target):
            say_replaced(output_folder / name, UNLESS_EQUAL)
    made: list[dict[str, Any]] = []
    for name, result in run(target, config, overwrite=overwrite, command=recorded_command(), track=track):
        page = None if isinstance(result, SealignError) else f"{output_folder / name}/index.html"
        error = str(result) if isinstance(result, SealignError) else None
        made.append({"target": name, "page": page, "finished_before": result is None, "error": error})
        if error is not None:
            messages.print(f"[bold red]error:[/] {name}: ", end="")
            messages.print(error, markup=False, soft_wrap=True)
        elif not json:
            output.print(f"{name}: {page}{' (finished before)' if result is None else ''}", markup=False)
            if isinstance(result, Table) and target != "all":
                output.print(to_markdown(result), markup=False, soft_wrap=True)
    if json:
        print_json(made)
    if any(entry["error"] for entry in made):
        raise typer.Exit(ERROR_EXIT_CODE)
