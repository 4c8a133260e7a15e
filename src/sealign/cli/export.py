"""``sealign export`` and ``sealign verify``: an edit carried into weights, and the proof that it is the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from sealign.cli import options
from sealign.cli.app import app, messages, output, require_extra

if TYPE_CHECKING:
    from sealign.edits.edit import Edit
    from sealign.export.verify import Agreement, Deviation, Outputs

exports = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(
    exports, name="export", help="Carry an edit into weights: a LoRA adapter, a merged checkpoint or a GGUF file."
)

_KINDS = ("lora", "merged", "gguf", "vllm")

Approximate = Annotated[
    bool,
    typer.Option(
        "--approximate", help="Export a rescaled edit without its rescaling, and measure how far that is off."
    ),
]
GgufBase = Annotated[
    Path | None,
    typer.Option("--base", metavar="FILE", help="GGUF file of the base model; not needed for the embedded one."),
]
Target = Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder to write to.")]


@exports.command()
def lora(
    edit: options.Edit,
    output_folder: Target,
    model: options.EditedModel = None,
    strength: options.Strength = None,
    approximate: Approximate = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    ignore_mismatch: options.IgnoreMismatch = False,
    json: options.Json = False,
) -> None:
    """Write an edit as a LoRA adapter that PEFT and servers load."""
    require_extra("peft", "peft")
    from sealign.export.lora import ADAPTER_CONFIG, export_lora
    from sealign.files import check_folder
    from sealign.models.loading import load_model

    loaded = _load_edit(edit, strength)
    check_folder(output_folder, replaces=ADAPTER_CONFIG)
    with messages.status("Loading the model"):
        base, tokenizer = load_model(model or loaded.record.model.id, dtype=dtype, device=device)
    paths = export_lora(base, loaded, output_folder, approximate=approximate, ignore_mismatch=ignore_mismatch)
    deviation = _deviation(base, tokenizer, loaded, output_folder) if approximate else None
    _report("LoRA adapter", output_folder, paths, deviation, json)


@exports.command()
def merged(
    edit: options.Edit,
    output_folder: Target,
    model: options.EditedModel = None,
    strength: options.Strength = None,
    approximate: Approximate = False,
    ignore_mismatch: options.IgnoreMismatch = False,
    json: options.Json = False,
) -> None:
    """Write a complete checkpoint with an edit in its weights, shard by shard."""
    from sealign.export.merged import export_merged
    from sealign.files import check_folder
    from sealign.models.loading import checkpoint_folder, load_model

    loaded = _load_edit(edit, strength)
    check_folder(output_folder, replaces="config.json")
    name = model or loaded.record.model.id
    with messages.status("Merging"):
        source = checkpoint_folder(name)
        changed = export_merged(source, loaded, output_folder, approximate=approximate, ignore_mismatch=ignore_mismatch)
    deviation = None
    if approximate:
        deviation = _deviation(*load_model(name), loaded, output_folder)
    _report("merged checkpoint", output_folder, changed, deviation, json)


@exports.command()
def gguf(
    edit: options.Edit,
    output_file: Annotated[Path, typer.Option("--output", metavar="FILE", help="GGUF file to write.")],
    base: GgufBase = None,
    as_lora: Annotated[
        bool, typer.Option("--lora", help="Write a GGUF LoRA, to be loaded beside the base file, not a whole model.")
    ] = False,
    model: options.EditedModel = None,
    strength: options.Strength = None,
    approximate: Approximate = False,
    ignore_mismatch: options.IgnoreMismatch = False,
    json: options.Json = False,
) -> None:
    """Write an edit for llama.cpp: in the weights of a GGUF file, or as a GGUF LoRA."""
    require_extra("gguf", "gguf")
    from sealign.errors import SettingError
    from sealign.export.gguf import export_gguf, export_gguf_lora
    from sealign.models.embedded_model import EMBEDDED, embedded_file
    from sealign.models.loading import load_model

    loaded = _load_edit(edit, strength)
    name = model or loaded.record.model.id
    if base is None and name != EMBEDDED and not name.endswith(".gguf"):
        raise SettingError(f"the edit's base model is '{name}', which is no GGUF file; name one with --base")
    source = base or (embedded_file() if name == EMBEDDED else Path(name))
    with messages.status("Loading the model"):
        built, _ = load_model(name)
    settings = {"approximate": approximate, "ignore_mismatch": ignore_mismatch}
    with messages.status("Writing"):
        if as_lora:
            changed = export_gguf_lora(built, source, loaded, output_file, **settings)
            _report("GGUF LoRA", output_file, changed, None, json)
            return
        rewritten = export_gguf(built, source, loaded, output_file, **settings)
    kinds = sorted({(tensor.before, tensor.after) for tensor in rewritten})
    _report("GGUF model", output_file, [tensor.name for tensor in rewritten], None, json)
    if not json:
        told = ", ".join(before if before == after else f"{before}, written as {after}" for before, after in kinds)
        kept = sum(tensor.kept for tensor in rewritten) / len(rewritten)
        advice = "; --lora keeps all of it" if kept < 0.9 else ""
        output.print(
            f"Types of these tensors: {told}. After rounding, {kept:.0%} of the edit is left{advice}.", soft_wrap=True
        )


@app.command()
def verify(
    edit: options.Edit,
    against: Annotated[
        list[str],
        typer.Option(
            "--against",
            metavar="KIND=PLACE",
            help="A deployment: lora=DIR, merged=DIR, gguf=FILE, or vllm=URL#NAME for an edit that a server calls "
            "NAME. Several, if you like.",
        ),
    ],
    model: options.EditedModel = None,
    base: GgufBase = None,
    strength: options.Strength = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", metavar="X", help="Of the largest difference of a log-probability, in nats.")
    ] = 1e-3,
    max_new_tokens: options.MaxNewTokens = 16,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
    ignore_mismatch: options.IgnoreMismatch = False,
    json: options.Json = False,
) -> None:
    """Run the same prompts through hooks and through deployments, and fail where one differs or does not edit."""
    from sealign.cli.display import print_json
    from sealign.export.verify import compare_outputs, reference_outputs
    from sealign.models.loading import load_model

    loaded = _load_edit(edit, strength)
    name = model or loaded.record.model.id
    with messages.status("Running the hooks"):
        loading = {"dtype": dtype, "device": device}
        built, tokenizer = load_model(name, **loading)
        plain, edited = reference_outputs(built, tokenizer, loaded, max_new_tokens=max_new_tokens)
    found = []
    for text in against:
        with messages.status(f"Running {text}"):
            deployed = _deployed(text, name, base, tokenizer, loading, max_new_tokens)
        found.append(compare_outputs(text, plain, edited, deployed, tolerance=tolerance))
    if json:
        print_json([dataclasses.asdict(a) | {"fired": a.fired, "passed": a.passed} for a in found])
    else:
        _show(found)
    if not all(agreement.passed for agreement in found):
        raise typer.Exit(1)


def _deployed(
    text: str, name: str, base: Path | None, tokenizer: Any, loading: dict[str, Any], max_new_tokens: int
) -> Outputs:
    """Run the prompts through one deployment."""
    from sealign.errors import SettingError, unknown_name
    from sealign.export.verify import model_outputs
    from sealign.models.loading import load_model

    kind, _, place = text.partition("=")
    if kind not in _KINDS or not place:
        raise SettingError(unknown_name("deployment", kind, _KINDS) + ", as lora=DIR")
    if kind == "vllm":
        return _served(place, tokenizer, max_new_tokens)
    if not (Path(place).is_file() if kind == "gguf" else Path(place).is_dir()):
        raise SettingError(
            f"there is no {'file' if kind == 'gguf' else 'folder'} '{place}' for --against {text}; check the path"
        )
    if kind == "gguf":
        return _in_llama_cpp(Path(place), base, name, tokenizer, max_new_tokens)
    if kind == "merged":
        return model_outputs(*load_model(place, **loading), max_new_tokens=max_new_tokens)
    require_extra("peft", "peft")
    from peft import PeftModel

    model, tokenizer = load_model(name, **loading)
    adapted: Any = PeftModel.from_pretrained(model, place).eval()
    return model_outputs(adapted, tokenizer, max_new_tokens=max_new_tokens)


def _served(place: str, tokenizer: Any, max_new_tokens: int) -> Outputs:
    from sealign.errors import SettingError
    from sealign.serving.client import server_outputs

    require_extra("serve", "openai")
    url, _, edit_name = place.partition("#")
    if not edit_name:
        raise SettingError(f"--against vllm={place} names no edit; write vllm={place}#NAME")
    return server_outputs(url, edit_name, tokenizer, max_new_tokens=max_new_tokens)


def _in_llama_cpp(file: Path, base: Path | None, name: str, tokenizer: Any, max_new_tokens: int) -> Outputs:
    from sealign.export.llama_cpp import llama_outputs
    from sealign.models.embedded_model import EMBEDDED, embedded_file

    require_extra("llama", "llama_cpp", "gguf")
    source = embedded_file() if base is None and name == EMBEDDED else base
    return llama_outputs(file, source, tokenizer, max_new_tokens=max_new_tokens)


def _load_edit(source: str, strength: float | None) -> Edit:
    from sealign.edits.edit import Edit

    return Edit.from_pretrained(source).with_settings(strength=strength)


def _deviation(model: Any, tokenizer: Any, edit: Edit, folder: Path) -> Deviation | None:
    """Measure what leaving out the rescaling changes, and keep it with the export."""
    import json

    from sealign.evaluation.damage import bundled_texts
    from sealign.export.verify import measure_deviation
    from sealign.files import write_bytes

    if edit.settings.normalization == "none":
        return None
    with messages.status("Measuring the deviation on neutral text"):
        deviation = measure_deviation(model, tokenizer, edit, bundled_texts())
    write_bytes(folder / "deviation.json", json.dumps(dataclasses.asdict(deviation), indent=2).encode() + b"\n")
    return deviation


def _report(what: str, folder: Path, changed: list[str], deviation: Deviation | None, json: bool) -> None:
    from sealign.cli.display import print_json

    if json:
        measured = None if deviation is None else dataclasses.asdict(deviation)
        print_json({"folder": str(folder), "changed": changed, "deviation": measured})
        return
    output.print(f"Wrote the {what} to {folder}: {len(changed)} tensors carry the edit.", markup=False, soft_wrap=True)
    if deviation is not None:
        output.print(
            f"Without its rescaling the edit differs: KL {deviation.mean_divergence:.2e} nats a token on average, "
            f"{deviation.largest_divergence:.2e} at most; the same most probable token at {deviation.same_top:.1%} of "
            "tokens of neutral text."
        )


def _show(found: list[Agreement]) -> None:
    from sealign.cli.evaluation_display import plain_table

    table = plain_table("Deployments against hooks: log-probabilities of the prompts, nats", "deployment")
    for name in ("largest", "mean", "effect", "share", "same tokens", "verdict"):
        table.add_column(name, justify="right", no_wrap=True)
    for a in found:
        word = "[green]equal[/]" if a.passed else "[red]differs[/]" if a.fired else "[red]does not edit[/]"
        figures = (f"{a.largest:.1e}", f"{a.mean:.1e}", f"{a.effect:.1e}", f"{a.share:.1%}", f"{a.same_tokens:.0%}")
        table.add_row(escape(a.name), *figures, word)
    table.caption = (
        "effect: what the edit changes; share: how much of that the deployment has, where under half is none."
    )
    table.caption_justify = "left"
    output.print(table)
