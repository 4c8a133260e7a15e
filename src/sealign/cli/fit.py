"""``sealign fit``: fit a method from demonstrations and save the edit."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sealign.cli import option_values, options
from sealign.cli.app import Commands, PlainCommand, app
from sealign.cli.consoles import messages, output
from sealign.cli.loading import MODEL_OPTIONS, ModelOptions, say_strength, with_model_options
from sealign.spellings import respelled

if TYPE_CHECKING:
    from sealign.configuration import Config
    from sealign.demonstrations.demonstration import Demonstration
    from sealign.demonstrations.splits import Holdout
    from sealign.edits.intervention import Intervention
    from sealign.evaluation.strength_choice import StrengthChoice

DEFAULT_METHOD = "sea"

UsedDemonstrations = Annotated[
    list[str] | None, options.with_note(options.DEMONSTRATIONS, "Required by methods that learn from demonstrations.")
]
FitOutput = Annotated[Path | None, options.with_note(options.OUTPUT, "Required unless --plan is given.")]


class FitCommand(PlainCommand):
    """Command whose options include the settings of the method given by ``--method``."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Return the context of the command for the method given by ``--method``."""
        from sealign.cli.method_options import method_flags
        from sealign.methods.registry import METHODS

        name = _method_name(args)
        args = respelled(args, [flag for method in METHODS for flag in method_flags(method)])
        return _method_command(name, args).make_context(info_name, args, parent, **extra)


def _method_name(arguments: list[str]) -> str:
    """Return the value of ``--method`` in a command line."""
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == "--method" and (equals or index + 1 < len(arguments)):
            return value if equals else arguments[index + 1]
    return DEFAULT_METHOD


def _method_command(name: str, arguments: list[str]) -> Any:
    """Return the command that fits one method.

    Args:
        name: Name of the method.
        arguments: The command line, which must not have an option of another method.
    """
    from sealign.cli.method_options import PRESETS, method_options, refuse_foreign_options

    panel = f"Settings of {name}"
    own = [option.parameter(panel) for option in method_options(name)]
    if name in PRESETS:
        text = f"Named settings to use as defaults. Available: {', '.join(PRESETS[name])}."
        info = typer.Option("--preset", metavar="NAME", help=text, rich_help_panel=panel)
        keyword = inspect.Parameter.KEYWORD_ONLY
        own.insert(0, inspect.Parameter("preset", keyword, annotation=Annotated[str | None, info], default=None))

    @functools.wraps(fit)
    def run(**given: Any) -> None:
        fit(**given)

    common = list(inspect.signature(fit).parameters.values())
    first = len(common) - len(MODEL_OPTIONS)
    parameters = [*common[:first], *own, *common[first:]]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    made = Commands(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    made.command()(run)
    command: Any = typer.main.get_command(made)
    known = [flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)]
    refuse_foreign_options(name, arguments, known)
    return command


@app.command(cls=FitCommand)
@with_model_options()
def fit(
    model: ModelOptions,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help=f"{options.METHOD_HELP} Its settings are listed by sealign fit --method NAME --help.",
        ),
    ] = DEFAULT_METHOD,
    demonstrations: UsedDemonstrations = None,
    output_folder: FitOutput = None,
    overwrite: options.Overwrite = False,
    data_dir: options.DataDir = None,
    columns: options.Columns = None,
    demonstrations_limit: options.DemonstrationsLimit = None,
    holdout: options.Holdout = None,
    settings: options.Settings = None,
    max_damage: Annotated[
        float | None,
        options.with_note(
            options.MAX_DAMAGE,
            "Chooses the largest strength for which the KL divergence from the base model is within it, on neutral "
            r"text and on the model's own answers. Not with --strength or --preset. \[default: 0.05, unless one of "
            "them is given]",
        ),
    ] = None,
    seed: options.Seed = 0,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Estimate time and memory from the configuration of the model, without fitting."),
    ] = False,
    tflops: Annotated[
        float | None,
        typer.Option(
            "--tflops",
            metavar="X",
            help=r"Throughput of the target hardware in TFLOP/s, used by --plan. \[default: measured on this machine]",
        ),
    ] = None,
    json: options.Json = False,
    **own: Any,
) -> None:
    """Fit a method from demonstrations and save the edit to a folder.

    Without --strength, the strength is chosen by --max-damage, so that the edit does not break the model.

    Finished batches are kept in the user's cache, so after an interruption the same command continues the fit. To fit
    with several processes, start them with torchrun: torchrun --nproc-per-node 2 -m sealign fit ...
    """
    from sealign.cli.display import print_json, print_record, print_saved
    from sealign.cli.method_options import given_settings, method_config
    from sealign.cli.outputs import check_output_folder
    from sealign.demonstrations.splits import Holdout, split_demonstrations
    from sealign.edits.record import RECORD_NAME
    from sealign.errors import SettingError
    from sealign.methods.registry import check_fit, load_edit

    preset, given, named = own.pop("preset", None), given_settings(own), option_values.named_values(settings)
    config = method_config(method, given, settings=named, preset=preset, seed=seed)
    budget = _damage_budget(config, max_damage, fixed=preset is not None or "strength" in given or "strength" in named)
    if tflops is not None and not plan:
        raise SettingError("--tflops is used by --plan only; leave it out or add --plan")
    if output_folder is None and not plan:
        raise SettingError("there is no folder to write the edit to; add --output PATH, or --plan to write nothing")
    if output_folder is not None:
        check_output_folder(output_folder, mark=RECORD_NAME, overwrite=overwrite)
    used = option_values.load_sources(demonstrations or [], data_dir, demonstrations_limit, seed, columns)
    held_out = None if holdout is None else Holdout(holdout, seed)
    fitted = used if held_out is None else split_demonstrations(used, holdout=held_out.fraction, seed=seed)[0]
    check_fit(config, fitted)
    if plan or output_folder is None:
        _print_plan(model, fitted, config, tflops, json)
        return
    edit, choice = _fit(model, used, config, held_out, budget)
    if edit is None:
        return
    edit.save_pretrained(output_folder, overwrite=overwrite)
    if budget is None and edit.strength is not None:
        say_strength(edit, edit.strength)
    edit = load_edit(output_folder)
    if json:
        print_json(edit.record)
        return
    print_record(edit)
    if choice is not None:
        output.print(_describe(choice, budget))
    print_saved(edit.record, output_folder)


def _damage_budget(config: Config, max_damage: float | None, *, fixed: bool) -> float | None:
    """Return the damage by which the strength is chosen, or None if the strength is given or the method has none."""
    from sealign.errors import SettingError
    from sealign.evaluation.verdict import MAX_DAMAGE
    from sealign.fitting.edit_config import EditConfig

    if max_damage is not None and (fixed or not isinstance(config, EditConfig)):
        raise SettingError(
            f"--max-damage is {max_damage:g}, but it chooses the strength, which is given by --strength, --set or "
            "--preset or which the method does not have; leave --max-damage out"
        )
    if fixed or not isinstance(config, EditConfig):
        return None
    return MAX_DAMAGE if max_damage is None else max_damage


def _describe(choice: StrengthChoice, budget: float | None) -> str:
    if not choice.strength:
        return f"[bold red]No strength is within the budget of {budget:g} nats per token, so the edit does nothing.[/]"
    answers = "" if choice.domain is None else f", {choice.domain.mean_divergence:.4f} on own answers"
    return (
        f"Strength {choice.strength:.4g} was chosen: loss on neutral text {choice.neutral.loss_increase:+.4f}, KL from "
        f"the base model {choice.neutral.mean_divergence:.4f} on neutral text{answers}; budget {budget:g} nats per "
        "token."
    )


def _fit(
    model: ModelOptions,
    demonstrations: list[Demonstration],
    config: Config,
    holdout: Holdout | None,
    budget: float | None,
) -> tuple[Intervention | None, StrengthChoice | None]:
    """Fit a method, and return the edit and the choice of its strength in the first worker, None in the others."""
    from sealign.cache import cache_dir
    from sealign.cli.display import track
    from sealign.cli.plan_display import plan_line
    from sealign.edits.edit import Edit
    from sealign.evaluation.strength_choice import DamageBudget, DamageTexts, choose_strength
    from sealign.fitting.edit_config import EditConfig
    from sealign.fitting.plan import plan_fit
    from sealign.fitting.workers import worker_group
    from sealign.methods.registry import fit_edit
    from sealign.progress import no_progress

    with worker_group() as first:
        loaded, tokenizer = model.load()
        # Like progress bars, shown on a terminal only: redirected output holds results and errors.
        if first and messages.is_terminal and isinstance(config, EditConfig):
            messages.say(plan_line(plan_fit(loaded, tokenizer, demonstrations, config)))
        edit = fit_edit(
            loaded,
            tokenizer,
            demonstrations,
            config=config,
            holdout=holdout,
            checkpoint_dir=cache_dir() / "fits",
            track=track if first else no_progress,
        )
    if not first:
        return None, None
    if budget is None or not isinstance(edit, Edit) or not isinstance(config, EditConfig):
        return edit, None
    texts = DamageTexts.of(loaded, tokenizer, demonstrations, prompt_format=config.prompt_format, track=track)
    choice = choose_strength(
        loaded, tokenizer, edit, texts, budget=DamageBudget(budget), limit=config.max_strength, track=track
    )
    return edit.with_strength(choice.strength), choice


def _print_plan(
    model: ModelOptions, demonstrations: list[Demonstration], config: Config, tflops: float | None, json: bool
) -> None:
    from sealign.cli.display import print_json
    from sealign.cli.plan_display import plan_table
    from sealign.errors import SettingError
    from sealign.fitting.edit_config import EditConfig
    from sealign.fitting.plan import plan_fit
    from sealign.methods.registry import method_of

    if not isinstance(config, EditConfig):
        raise SettingError(
            f"--plan estimates the collection of activations, but {method_of(config).name} collects none; leave it out"
        )
    skeleton, tokenizer = model.load_skeleton()
    found = plan_fit(skeleton, tokenizer, demonstrations, config, device=model.device, tflops=tflops)
    if json:
        print_json(found)
    else:
        output.print(plan_table(found))
