"""``sealign fit``: demonstrations in, an edit out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sealign.cli import options
from sealign.cli.app import app, messages, output

if TYPE_CHECKING:
    from sealign.demonstrations.demonstration import Demonstration
    from sealign.methods.sea_config import FitConfig


@app.command()
def fit(
    demonstrations: options.Demonstrations,
    output_folder: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Folder to write the edit to.")
    ] = None,
    model: options.Model = None,
    data_dir: options.DataDir = None,
    limit: options.Limit = None,
    explained_variance: options.ExplainedVariance = None,
    rank: options.Rank = None,
    centered: options.Centered = None,
    feature_map: options.FeatureMap = None,
    site: options.Site = None,
    fit_site: options.FitSite = None,
    layers: options.Layers = None,
    module_pattern: options.ModulePattern = None,
    combine: options.Combine = None,
    normalization: options.Normalization = None,
    strength: options.FitStrength = None,
    token: options.Token = None,
    neutral: options.Neutral = None,
    max_new_tokens: options.NeutralMaxNewTokens = None,
    prompt_format: options.PromptStyle = None,
    preamble: options.Preamble = None,
    batch_size: options.BatchSize = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    reference: Annotated[
        bool, typer.Option("--reference", help="Start from the settings of the paper's released code.")
    ] = False,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Say what the fit will take, from the model's configuration alone, and stop."),
    ] = False,
    teraflops: Annotated[
        float | None,
        typer.Option("--teraflops", metavar="X", help="Rate of other hardware, for --plan; else it is measured here."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Fit an edit of a model from demonstrations and save it.

    A run that is stopped keeps its finished batches in the user's cache; the same command goes on from there. Several
    processes share a fit when torchrun starts them: torchrun --nproc-per-node 2 -m sealign fit ...
    """
    import dataclasses

    from sealign.cli.display import layer_table, print_json, print_saved, settings_table, track
    from sealign.cli.plan_display import plan_line
    from sealign.errors import SettingError
    from sealign.files import CONFIG_NAME, cache_dir, check_folder
    from sealign.fitting.plan import plan_fit
    from sealign.fitting.workers import worker_group
    from sealign.methods.sea import fit_edit
    from sealign.methods.sea_config import FitConfig
    from sealign.models.embedded_model import EMBEDDED
    from sealign.models.loading import load_model
    from sealign.models.prompt_format import PromptFormat, read_preamble
    from sealign.progress import no_progress

    given: dict[str, Any] = {
        "explained_variance": _pair(explained_variance, float, "--explained-variance"),
        "rank": _pair(rank, int, "--rank"),
        "centered": centered,
        "feature_map": feature_map,
        "site": site,
        "fit_site": fit_site,
        "layers": layers,
        "module_pattern": module_pattern,
        "combine": combine,
        "normalization": normalization,
        "strength": strength,
        "token": token,
        "neutral": neutral,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "seed": seed,
    }
    if prompt_format is not None or preamble is not None:
        text = None if preamble is None else read_preamble(preamble)
        given["prompt_format"] = PromptFormat(prompt_format or ("auto" if preamble is None else "few_shot"), text)  # type: ignore[arg-type]
    start = FitConfig.reference() if reference else FitConfig()
    config = dataclasses.replace(start, **{name: value for name, value in given.items() if value is not None})
    # What can be wrong is found before anything slow is started.
    if teraflops is not None and not plan:
        raise SettingError("--teraflops is the rate of other hardware, for --plan alone; leave it out or add --plan")
    if output_folder is None and not plan:
        raise SettingError("there is no folder to write the edit to; add --output DIR, or --plan to write nothing")
    if output_folder is not None:
        check_folder(output_folder, replaces=CONFIG_NAME)
    learnt = options.load_sources(demonstrations, data_dir, limit, seed)
    if plan or output_folder is None:
        _print_plan(model or EMBEDDED, learnt, config, dtype, device, teraflops, json)
        return
    with worker_group() as first:
        with messages.status("Loading the model"):
            loaded, tokenizer = load_model(model or EMBEDDED, dtype=dtype, device=device)
        if first and messages.is_terminal:  # as with progress bars, what is redirected holds results and errors only
            messages.print(plan_line(plan_fit(loaded, tokenizer, learnt, config)), soft_wrap=True)
        edit = fit_edit(
            loaded,
            tokenizer,
            learnt,
            config=config,
            checkpoint_dir=cache_dir() / "fits",
            track=track if first else no_progress,
        )
    if not first:  # of several workers, one writes
        return
    edit.save_pretrained(output_folder)
    edit = type(edit).from_pretrained(output_folder)
    if json:
        print_json(dataclasses.asdict(edit.record))
        return
    output.print(settings_table(edit.record), layer_table(edit.record))
    print_saved(edit.record, output_folder)


def _print_plan(
    model: str,
    demonstrations: list[Demonstration],
    config: FitConfig,
    dtype: str,
    device: str,
    teraflops: float | None,
    json: bool,
) -> None:
    import dataclasses

    from sealign.cli.display import print_json
    from sealign.cli.plan_display import plan_table
    from sealign.fitting.plan import plan_fit
    from sealign.models.loading import load_skeleton

    skeleton, tokenizer = load_skeleton(model, dtype=dtype, device=device)
    found = plan_fit(skeleton, tokenizer, demonstrations, config, device=device, teraflops=teraflops)
    if json:
        print_json(dataclasses.asdict(found))
    else:
        output.print(plan_table(found))


def _pair(text: str | None, kind: type[float] | type[int], option: str) -> Any:
    """Parse ``0.9`` or ``0.9,0.99``."""
    from sealign.errors import SettingError

    if text is None:
        return None
    try:
        values = tuple(kind(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, 2):
        raise SettingError(f"{option} is '{text}', but it must be one number, or two with a comma between")
    return values[0] if len(values) == 1 else values
