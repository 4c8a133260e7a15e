"""``sealign export``: write an edit in other formats."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sealign.cli import options
from sealign.cli.app import Commands, add_group, require_extra
from sealign.cli.consoles import messages, output
from sealign.cli.loading import ModelOptions, say_strength, with_model_options
from sealign.cli.outputs import check_output_files, check_output_folder

if TYPE_CHECKING:
    from sealign.edits.edit import Edit
    from sealign.export.deviation import Deviation
    from sealign.export.gguf import RewrittenTensor

exports: Commands = add_group(
    "export", "Export an edit as a LoRA adapter, a merged checkpoint, a GGUF file or a control vector."
)

Approximate = Annotated[
    bool,
    typer.Option("--approximate", help="Export a rescaled edit without its rescaling, and report the resulting error."),
]


@exports.command()
@with_model_options(options.EditedModel)
def lora(
    edit: options.SingleEdit,
    output_path: options.Output,
    model: ModelOptions,
    strength: options.Strength = None,
    approximate: Approximate = False,
    ignore_mismatch: options.IgnoreMismatch = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Export an edit as a LoRA adapter, which PEFT and servers load.

    The edit must act on the MLP or attention output, be of low rank, have no constant part, and not be rescaled (or
    pass --approximate). Only the edited modules are read from the checkpoint if it is in safetensors.
    """
    require_extra("peft", "peft")
    from sealign.export.lora import export_lora
    from sealign.export.requirements import check_exportable

    loaded = _load(edit, strength)
    check_exportable(loaded, approximate=approximate)
    chosen = model.or_base_of(loaded)
    check_output_folder(output_path, overwrite=overwrite, sources=[edit, str(chosen.name)])
    deviation, checkpoint, base = None, None, None
    if loaded.normalization == "none" and model.quantization is None:
        base, checkpoint = chosen.open_checkpoint() or (None, None)
    if base is None:
        base, tokenizer = chosen.load()
        deviation = _deviation(base, tokenizer, loaded, ignore_mismatch)
    settings: dict[str, Any] = {"approximate": approximate, "ignore_mismatch": ignore_mismatch, "overwrite": overwrite}
    paths = export_lora(base, loaded, output_path, checkpoint=checkpoint, deviation=deviation, **settings)
    _report("LoRA adapter", output_path, paths, deviation, json)


@exports.command()
def merged(
    edit: options.SingleEdit,
    output_path: options.Output,
    model: options.EditedModel = None,
    revision: options.Revision = None,
    strength: options.Strength = None,
    approximate: Approximate = False,
    ignore_mismatch: options.IgnoreMismatch = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Export a complete checkpoint with the edit merged into its weights, which any engine loads.

    If the edit adds a constant vector (mean difference, ITI), the architecture must support a bias there.
    """
    from sealign.export.merged import export_merged
    from sealign.export.requirements import check_exportable
    from sealign.models.loading import checkpoint_folder, load_model

    loaded = _load(edit, strength)
    check_exportable(loaded, approximate=approximate)
    name = model or loaded.base_model.id
    if model is None:
        revision = revision or loaded.base_model.revision
    check_output_folder(output_path, overwrite=overwrite, sources=[edit, name])
    source = checkpoint_folder(name, revision=revision)
    deviation = None
    if loaded.normalization != "none":
        deviation = _deviation(*load_model(str(source)), loaded, ignore_mismatch)
    settings: dict[str, Any] = {"approximate": approximate, "ignore_mismatch": ignore_mismatch, "overwrite": overwrite}
    with messages.status("Merging"):
        changed = export_merged(source, loaded, output_path, deviation=deviation, **settings)
    _report("merged checkpoint", output_path, changed, deviation, json)


@exports.command()
@with_model_options(options.EditedModel)
def gguf(
    edit: options.SingleEdit,
    output_path: options.Output,
    model: ModelOptions,
    base: options.GgufBase = None,
    as_lora: Annotated[
        bool,
        typer.Option("--lora", help="Write only a GGUF LoRA, which llama.cpp loads together with the base file."),
    ] = False,
    strength: options.Strength = None,
    approximate: Approximate = False,
    ignore_mismatch: options.IgnoreMismatch = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Export an edit for llama.cpp: merged into the weights of a GGUF file, or as a separate GGUF LoRA."""
    require_extra("gguf", "gguf")
    from sealign.export.gguf import export_gguf, export_gguf_lora
    from sealign.export.gguf_file import base_file
    from sealign.export.requirements import check_exportable

    loaded = _load(edit, strength)
    check_exportable(loaded, approximate=approximate)
    source = base_file(model.name or loaded.base_model.id, base)
    check_output_files([output_path], overwrite=overwrite, sources=_files_read(edit, source))
    built, tokenizer = model.or_base_of(loaded).load()
    settings = {"approximate": approximate, "ignore_mismatch": ignore_mismatch, "overwrite": overwrite}
    rewritten: list[RewrittenTensor] = []
    with messages.status("Writing"):
        if as_lora:
            changed = export_gguf_lora(built, source, loaded, output_path, **settings)
        else:
            rewritten = export_gguf(built, source, loaded, output_path, **settings)
            changed = [tensor.name for tensor in rewritten]
    deviation = _deviation(built, tokenizer, loaded, ignore_mismatch)
    _report("GGUF LoRA" if as_lora else "GGUF model", output_path, changed, deviation, json, rewritten)


@exports.command()
def control_vector(
    edit: options.SingleEdit,
    output_path: options.Output,
    base: options.GgufBase = None,
    strength: options.Strength = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Export a constant shift of the residual stream, for example a mean difference, as a llama.cpp control vector.

    Load it together with the base model:

        llama-server --model BASE.gguf --control-vector FILE
    """
    require_extra("gguf", "gguf")
    from sealign.export.control_vector import export_control_vector
    from sealign.export.gguf_file import architecture_of, base_file, open_gguf

    loaded = _load(edit, strength)
    source = base_file(loaded.base_model.id, base)
    check_output_files([output_path], overwrite=overwrite, sources=_files_read(edit, source))
    architecture = None if source is None else architecture_of(open_gguf(source))
    written = export_control_vector(loaded, output_path, architecture=architecture, overwrite=overwrite)
    _report("control vector", output_path, written, None, json)


def _files_read(edit: str, base: Path | None) -> list[Path]:
    """Return the files of an edit and of its base model, which an export to a file must not replace."""
    return [*Path(edit).glob("*"), *([] if base is None else [base])]


def _load(source: str, strength: float | None) -> Edit:
    from sealign.export.requirements import load_single_edit

    loaded = load_single_edit(source, strength=strength)
    if strength is not None:
        say_strength(load_single_edit(source), strength)
    return loaded


def _deviation(model: Any, tokenizer: Any, edit: Edit, ignore_mismatch: bool) -> Deviation | None:
    """Measure the effect of leaving out the rescaling; None if the edit has none."""
    from sealign.demonstrations.bundled import neutral_texts
    from sealign.export.deviation import measure_deviation

    if edit.normalization == "none":
        return None
    with messages.status("Measuring the deviation on neutral text"):
        return measure_deviation(model, tokenizer, edit, neutral_texts(), ignore_mismatch=ignore_mismatch)


def _report(
    what: str,
    path: Path,
    changed: Sequence[str],
    deviation: Deviation | None,
    json: bool,
    rewritten: Sequence[RewrittenTensor] = (),
) -> None:
    from sealign.cli.display import print_json

    if json:
        measured = None if deviation is None else deviation.as_data()
        tensors = [dataclasses.asdict(tensor) for tensor in rewritten]
        print_json({"path": str(path), "changed": list(changed), "deviation": measured, "rewritten": tensors})
        return
    output.print(f"Wrote the {what} to {path}: {len(changed)} tensors carry the edit.", markup=False, soft_wrap=True)
    if deviation is not None and deviation.broken:
        output.print(
            "[bold red]Broken[/]: with or without its rescaling, the edit gives probabilities that are NaN or infinite "
            "on neutral text.",
            soft_wrap=True,
        )
    elif deviation is not None:
        output.print(
            f"Without its rescaling the edit differs: KL {deviation.mean_divergence:.2e} nats per token on average, "
            f"{deviation.largest_divergence:.2e} at most; the same most probable token at {deviation.same_top:.1%} of "
            "the tokens of neutral text."
        )
    if rewritten:
        _print_rounding(rewritten)


def _print_rounding(rewritten: Sequence[RewrittenTensor]) -> None:
    from sealign.export.gguf import mean_kept

    kinds = sorted({(tensor.before, tensor.after) for tensor in rewritten})
    types = ", ".join(before if before == after else f"{before}, written as {after}" for before, after in kinds)
    kept = mean_kept(rewritten)
    advice = "; --lora keeps all of it" if kept < 0.9 else ""
    output.print(
        f"Types of these tensors: {types}. After rounding, {kept:.0%} of the edit is left{advice}.", soft_wrap=True
    )
