"""``sealign evaluate``: measure edits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sealign.cli import option_values, options
from sealign.cli.app import app, quiet_harness, recorded_command, require_extra
from sealign.cli.consoles import messages, output
from sealign.cli.judging import load_judge
from sealign.cli.loading import ModelOptions, load_named, parse_names, with_model_options
from sealign.cli.measuring import (
    Aims,
    AnswerTokens,
    ApplyChatTemplate,
    Classifiers,
    Criterion,
    NumFewshot,
    Prompts,
    Scorers,
    SystemInstruction,
    answer_settings,
    check_effect,
    measuring_device,
)
from sealign.cli.model_server import check_server, open_engine
from sealign.cli.outputs import UNLESS_EQUAL, say_cards, say_replaced

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sealign.demonstrations.demonstration import Demonstration
    from sealign.edits.intervention import Intervention
    from sealign.models.prompt_format import PromptFormat


EvaluatedModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help=rf"{options.MODEL_HELP} \[default: the model that the first edit was fitted on; smollm2 without --edit]",
    ),
]
MethodDemonstrations = Annotated[
    list[str] | None,
    options.with_note(
        options.DEMONSTRATIONS,
        "The preference for their positive completions is scored on those that no edit was fitted on. Methods of "
        "--method are fitted on them, except for --holdout.",
    ),
]
SweptStrength = Annotated[
    str | None,
    typer.Option(
        "--strength",
        metavar="X,...",
        help=rf"{options.STRENGTH_HELP} With several, each edit has an arm with controls at each of them. One "
        r"applies to --edit only. \[default: the strength of each edit]",
    ),
]


@app.command()
@with_model_options(EvaluatedModel)
def evaluate(
    model: ModelOptions,
    output_folder: options.Output,
    tasks: options.Tasks = "",
    edit: Annotated[
        list[str] | None,
        typer.Option(
            "--edit",
            metavar="[NAME=]EDIT",
            help=f"{options.EDIT_HELP} NAME labels it in the results. Repeat the option to compare several. Without "
            "--edit and --method, only the base model is scored.",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="[NAME=]METHOD",
            help=f"{options.METHOD_HELP} It is fitted with its default settings. NAME labels it in the results. Repeat "
            "the option to compare several.",
        ),
    ] = None,
    demonstrations: MethodDemonstrations = None,
    columns: options.Columns = None,
    demonstrations_limit: options.DemonstrationsLimit = None,
    holdout: options.Holdout = None,
    data_dir: options.DataDir = None,
    limit: options.Limit = None,
    prompts: Prompts = None,
    classifier: Classifiers = None,
    scorer: Scorers = None,
    aim: Aims = None,
    criterion: Criterion = None,
    max_new_tokens: AnswerTokens = None,
    strength: SweptStrength = None,
    control_seeds: Annotated[
        str | None,
        typer.Option(
            "--control-seeds",
            metavar="N,N,...",
            help='Seeds of the controls in random directions. Pass "" for no random controls. '
            r"\[default: 0,1,2]",
        ),
    ] = None,
    no_reversed: Annotated[
        bool, typer.Option("--no-reversed", help="Leave out the controls in the opposite direction.")
    ] = False,
    max_damage: Annotated[
        float | None,
        options.with_note(options.MAX_DAMAGE, r"Damage is the increase of the loss on neutral text. \[default: 0.05]"),
    ] = None,
    apply_chat_template: ApplyChatTemplate = False,
    num_fewshot: NumFewshot = None,
    system_instruction: SystemInstruction = None,
    chat_template_arg: options.ChatTemplateArg = None,
    judge: options.JudgeModel = None,
    judge_url: options.JudgeUrl = None,
    batch_size: options.BatchSize = 8,
    server: Annotated[
        str | None,
        options.with_note(
            options.SERVER, "The administrator's token is read from SEALIGN_ADMIN_TOKEN. Needs --edits-dir."
        ),
    ] = None,
    edits_dir: Annotated[
        Path | None,
        options.with_note(options.EDITS_DIR, "that of the server, in which each arm is saved while it is evaluated."),
    ] = None,
    seed: options.Seed = 0,
    ignore_mismatch: options.IgnoreMismatch = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Evaluate edits: scores on tasks, answers to prompts, controls, damage, and a verdict.

    The base model, each edit and its controls are scored on the same items. The output folder contains report.html,
    results.json, table.csv and figures. After an interruption, run the same command again to continue.
    """
    require_extra("eval", "lm_eval", "datasets", "matplotlib", "yaml")
    quiet_harness()
    from sealign.cli.display import print_json, track
    from sealign.cli.evaluation_display import print_evaluation, reports_as_data
    from sealign.errors import SettingError
    from sealign.evaluation.comparison import report_edits
    from sealign.evaluation.evaluate_edits import evaluate as run
    from sealign.evaluation.evaluation_config import CONTROL_SEEDS, EvaluationConfig
    from sealign.evaluation.judge import JUDGED_TASK
    from sealign.evaluation.results import RESULTS_NAME
    from sealign.evaluation.unseen import split_seen
    from sealign.evaluation.verdict import MAX_DAMAGE
    from sealign.figures.report import FIGURES_NAME, REPORT_NAME, TABLE_NAME, write_report
    from sealign.folders import check_unmarked

    check_unmarked(output_folder, [REPORT_NAME, TABLE_NAME, FIGURES_NAME], mark=RESULTS_NAME)
    if overwrite:
        say_replaced(output_folder / RESULTS_NAME, UNLESS_EQUAL)
    sources, methods = parse_names(edit or [], "--edit"), parse_names(method or [], "--method")
    _check_used(sources, methods, strength, holdout)
    compared = {"--control-seeds": control_seeds, "--no-reversed": no_reversed or None, "--max-damage": max_damage}
    if not sources and not methods:
        option_values.check_absent(compared, "an edit, but there is no --edit and no --method")
    if prompts is None and JUDGED_TASK not in option_values.names(tasks):
        judging = {"--judge": judge, "--judge-url": judge_url}
        option_values.check_absent(judging, f"answers to --prompts or the task {JUDGED_TASK}, of which there are none")
    swept = option_values.strengths(strength)
    edits = load_named(sources, swept[0] if len(swept) == 1 else None)
    option_values.check_limit(limit, tasks)
    used = option_values.load_sources(demonstrations or [], data_dir, demonstrations_limit, seed, columns, tasks=tasks)
    fitted, held_out = split_seen(used, edits.values(), fits=bool(methods), holdout=holdout, seed=seed)
    _check_methods(methods, sources, fitted)
    judged = judge is not None
    check_server(server, edits_dir, methods, model, ignore_mismatch, judged=judged, measured=bool(classifier))
    asked = answer_settings(
        prompts, classifier or [], scorer or [], aim or [], criterion, max_new_tokens, measuring_device(model.device)
    )
    arguments = option_values.template_arguments(chat_template_arg)
    if criterion is not None and judge is None:
        raise SettingError("--criterion is for a judge of answers, but there is none; name one with --judge")
    check_effect(tasks, bool(asked or held_out), apply_chat_template, num_fewshot, arguments)
    chosen = model.or_base_of(next(iter(edits.values()), None))
    engine = None if server is None or edits_dir is None else open_engine(server, edits_dir, chosen, batch_size)
    loaded, tokenizer = chosen.load() if engine is None else (engine.skeleton, engine.tokenizer)
    edits |= _fit_methods(methods, loaded, tokenizer, fitted, output_folder)
    config = EvaluationConfig(
        tasks=option_values.names(tasks),
        data_dir=data_dir if option_values.names(tasks) else None,
        limit=limit,
        demonstrations=held_out or None,
        prompt_format=_prompt_format(next(iter(edits.values()), None), tokenizer, apply_chat_template, arguments),
        apply_chat_template=apply_chat_template and bool(option_values.names(tasks)),
        num_fewshot=num_fewshot,
        system_instruction=system_instruction,
        strengths=swept if len(swept) > 1 else (),
        control_seeds=CONTROL_SEEDS if control_seeds is None else _numbers("--control-seeds", control_seeds),
        reversed_control=not no_reversed,
        batch_size=batch_size,
        judge=load_judge(judge, judge_url, model.dtype, model.device),
        **asked,
    )
    results = run(
        loaded,
        tokenizer,
        edits,
        config=config,
        output=output_folder,
        sources=sources,
        command=recorded_command(),
        ignore_mismatch=ignore_mismatch,
        overwrite=overwrite,
        engine=engine,
        track=track,
    )
    max_damage = MAX_DAMAGE if max_damage is None else max_damage
    with messages.status("Computing statistics and drawing the report"):
        reports = report_edits(results, max_damage=max_damage, seed=seed)
        write_report(results, reports, output_folder, max_damage=max_damage)
        say_cards(results, reports)
    if json:
        print_json(reports_as_data(results, reports))
    else:
        print_evaluation(results, reports)
        if len(held_out) < len(used):
            left_out = len(used) - len(held_out)
            output.print(f"{left_out} of {len(used)} demonstrations are fitted on, so they were not scored.")
        output.print(f"Wrote {output_folder}/report.html, results.json, table.csv and figures.", markup=False)


def _prompt_format(
    edit: Intervention | None,
    tokenizer: PreTrainedTokenizerBase,
    apply_chat_template: bool,
    arguments: dict[str, Any],
) -> PromptFormat:
    """Return how demonstrations and prompts are written: as an edit was fitted, or with the chat template."""
    from sealign.models.prompt_format import prompt_format_of

    settings = edit.parts[0].record.config if edit is not None else {}
    fitted = prompt_format_of(settings).resolve(tokenizer).style
    style = "chat" if apply_chat_template and not fitted.endswith("chat") else None
    return prompt_format_of(settings, style, None, arguments)


def _check_used(edits: dict[str, str], methods: dict[str, str], strength: str | None, holdout: float | None) -> None:
    """Raise an error if an option is given that has no effect without another one."""
    from sealign.errors import SettingError

    if strength is not None and not edits:
        raise SettingError(f"--strength is {strength}, but there is no --edit that it applies to; leave it out")
    if holdout is not None and not methods:
        raise SettingError(
            f"--holdout is {holdout:g}, but it leaves out demonstrations of the fits of --method, of which there are "
            "none; leave it out"
        )


def _check_methods(methods: dict[str, str], edits: dict[str, str], demonstrations: list[Demonstration]) -> None:
    """Raise an error if a method cannot be fitted, before the model is loaded."""
    from sealign.errors import SettingError
    from sealign.methods.registry import check_fit, get_method

    for name, method in methods.items():
        if name in edits:
            raise SettingError(f"an edit and a method have the name '{name}'; name them, as in --method other={method}")
        check_fit(get_method(method).config(), demonstrations)


def _fit_methods(
    methods: dict[str, str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: list[Demonstration],
    folder: Path,
) -> dict[str, Intervention]:
    """Fit methods with their default settings, or load them if an earlier run has fitted them."""
    from sealign.cli.display import track
    from sealign.methods.fit_cache import fit_or_load
    from sealign.methods.registry import get_method

    return {
        name: fit_or_load(
            model,
            tokenizer,
            demonstrations,
            config=get_method(method).config(),
            folder=folder / "methods",
            track=track,
        )
        for name, method in methods.items()
    }


def _numbers(option: str, text: str) -> tuple[int, ...]:
    from sealign.errors import SettingError

    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise SettingError(f"{option} is '{text}', but it must be integers such as 0,1,2") from None
