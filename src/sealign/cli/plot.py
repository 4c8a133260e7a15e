"""``sealign plot``: figures of activations, spectra, signatures and the effect of an edit, with their data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sealign.cli import options
from sealign.cli.app import app, messages, output, require_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sealign.demonstrations.demonstration import Demonstration
    from sealign.edits.edit import Edit
    from sealign.figures import Mark, Spectra
    from sealign.fitting.activations import Activations
    from sealign.methods.sea_config import FitConfig

plots = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(plots, name="plot", help="Draw activations, spectra, signatures or an edit's effect as PDF, PNG and CSV.")

_SUFFIXES = (".pdf", ".png", ".csv")

FigurePath = Annotated[
    Path,
    typer.Option("--output", metavar="PATH", help="Where to write: PATH.pdf, PATH.png and, with the data, PATH.csv."),
]
SpectrumDemonstrations = Annotated[
    list[str] | None,
    typer.Option("--demonstrations", metavar="SOURCE", help="As for sealign fit; may be given several times."),
]
SpectrumEdit = Annotated[
    str | None,
    typer.Option(
        "--edit", metavar="EDIT", help="In place of demonstrations, an edit that holds spectra; no model runs."
    ),
]
ReadSite = Annotated[
    str | None,
    typer.Option(
        "--site", metavar="NAME", help=r"Where activations are read: mlp, attention or residual. \[default: mlp]"
    ),
]
EffectSite = Annotated[
    str | None,
    typer.Option(
        "--site",
        metavar="NAME",
        help=r"Where activations are read: mlp, attention or residual. \[default: where the edit acts]",
    ),
]
EffectMethod = Annotated[
    str,
    typer.Option(
        "--method", metavar="NAME", help="pca, a linear map, or tsne, which keeps neighbours but not lengths."
    ),
]


def _layers(default: str) -> Any:
    """The option that chooses layers, with the default of one command."""
    forms = "all, last:L, first:L, a share of the depth as last:21/32, or indices as 4,5,-1."
    return typer.Option("--layers", metavar="WHICH", help=rf"{forms} \[default: {default}]")


@plots.command()
def tsne(
    output_path: FigurePath,
    demonstrations: options.Demonstrations,
    model: options.Model = None,
    data_dir: options.DataDir = None,
    limit: options.Limit = None,
    layers: Annotated[str | None, _layers("first, middle and last")] = None,
    site: ReadSite = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Draw positive and negative activations in a plane by t-SNE, a panel for each layer."""
    require_extra("figures", "matplotlib", "sklearn")
    from sealign import figures

    path, config = _path(output_path), _config(layers, site, seed)
    learnt = options.load_sources(demonstrations, data_dir, limit, seed)
    figures.check_method("tsne", len(learnt))
    base, tokenizer, depth = _model(model, dtype, device)
    wanted = figures.first_middle_last(range(depth)) if layers is None else _select(layers, depth)
    marks = figures.tsne_points(_collect(base, tokenizer, learnt, config, wanted), wanted, seed=seed)
    _save(figures.plane(marks, "tsne"), marks, path)


@plots.command()
def spectrum(
    output_path: FigurePath,
    demonstrations: SpectrumDemonstrations = None,
    edit: SpectrumEdit = None,
    model: options.Model = None,
    data_dir: options.DataDir = None,
    limit: options.Limit = None,
    layers: Annotated[str | None, _layers("all")] = None,
    site: ReadSite = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Draw the singular values of the cross-covariances, a line for each layer.

    They are of demonstrations, uncentred, or those that a saved edit was made from.
    """
    require_extra("figures", "matplotlib", "sklearn")
    from sealign import figures
    from sealign.errors import SettingError

    if (edit is None) == (not demonstrations):
        raise SettingError("give either --demonstrations, to run a model over, or --edit, to read a saved edit")
    path, config = _path(output_path), _config(layers, site, seed)
    if edit is not None:
        given = {"--model": model, "--data-dir": data_dir, "--limit": limit, "--site": site}
        unused = [name for name, value in given.items() if value is not None]
        if unused:
            raise SettingError(f"{unused[0]} has no use with --edit, whose spectra are read as they are; leave it out")
        spectra = _saved_spectra(edit, layers)
    else:
        learnt = options.load_sources(demonstrations or [], data_dir, limit, seed)
        base, tokenizer, depth = _model(model, dtype, device)
        spectra = figures.activation_spectra(_collect(base, tokenizer, learnt, config, _select(layers, depth)))
    _save(figures.spectrum(spectra), figures.spectrum_points(spectra), path)


@plots.command()
def signature(
    output_path: FigurePath,
    demonstrations: options.Demonstrations,
    model: options.Model = None,
    data_dir: options.DataDir = None,
    limit: options.Limit = None,
    layers: Annotated[str | None, _layers("all")] = None,
    site: ReadSite = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Draw the signature of each layer, how much it knows of a behaviour: a line for each source of demonstrations."""
    require_extra("figures", "matplotlib", "sklearn")
    from sealign import figures
    from sealign.methods.sea import layer_signatures

    path, config = _path(output_path), _config(layers, site, seed)
    learnt = {
        name: options.load_sources([source], data_dir, limit, seed) for name, source in _named(demonstrations).items()
    }
    base, tokenizer, depth = _model(model, dtype, device)
    wanted = _select(layers, depth)
    signatures = {
        name: layer_signatures(_collect(base, tokenizer, items, config, wanted)) for name, items in learnt.items()
    }
    depths = dict.fromkeys(signatures, depth)
    figure = figures.signature(signatures, depths=depths)
    _save(figure, figures.signature_points(signatures, depths=depths), path)


@plots.command()
def effect(
    output_path: FigurePath,
    edit: options.Edit,
    demonstrations: options.Demonstrations,
    model: options.EditedModel = None,
    data_dir: options.DataDir = None,
    limit: options.Limit = None,
    layers: Annotated[str | None, _layers("the last edited one")] = None,
    site: EffectSite = None,
    method: EffectMethod = "pca",
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    ignore_mismatch: options.IgnoreMismatch = False,
) -> None:
    """Draw neutral activations before and after an edit, among positives and negatives, a panel for each layer.

    A neutral text is the prompt alone, so that it is the same before and after.
    """
    require_extra("figures", "matplotlib", "sklearn")
    from sealign import figures
    from sealign.edits.attach import apply_edit
    from sealign.edits.edit import Edit

    path, loaded = _path(output_path), Edit.from_pretrained(edit)
    config = _config(layers, site or loaded.settings.site, seed, _as_fitted(loaded, site))
    learnt = options.load_sources(demonstrations, data_dir, limit, seed)
    figures.check_method(method, len(learnt))
    base, tokenizer, depth = _model(model or loaded.record.model.id, dtype, device)
    wanted = loaded.layers[-1:] if layers is None else _select(layers, depth)
    # The edited run comes first: an edit of another model is refused before anything slow.
    with apply_edit(base, loaded, ignore_mismatch=ignore_mismatch):
        after = _collect(base, tokenizer, learnt, config, wanted)
    before = _collect(base, tokenizer, learnt, config, wanted)
    marks = figures.effect_points(before, after, wanted, method=method, seed=seed)  # type: ignore[arg-type]
    _save(figures.plane(marks, method), marks, path)  # type: ignore[arg-type]


def _path(output_path: Path) -> Path:
    """Return where to write, without a suffix of ours; what is in the way is found before anything slow."""
    from sealign.errors import SettingError

    path = output_path.with_suffix("") if output_path.suffix in _SUFFIXES else output_path
    if path.is_dir():
        raise SettingError(f"'{path}' is a folder, but a figure needs a name; try --output {path / 'figure'}")
    in_the_way = [parent for parent in path.parents if parent.is_file()]
    if in_the_way:
        raise SettingError(
            f"'{in_the_way[0]}' is a file, but the figure is to go into a folder; choose another --output"
        )
    return path


def _config(layers: str | None, site: str | None, seed: int, fitted: Mapping[str, Any] | None = None) -> FitConfig:
    """Return how to collect; a wrong layer or site is found before anything slow."""
    from sealign.errors import SettingError
    from sealign.methods.sea_config import FitConfig

    given: dict[str, Any] = {"layers": layers, "site": site} | dict(fitted or {})
    config = FitConfig(seed=seed, **{name: value for name, value in given.items() if value is not None})
    if layers is not None and layers.startswith("signature:"):
        raise SettingError(f"--layers is '{layers}', but a figure shows layers that are named; try all or last:8")
    return config


def _as_fitted(edit: Edit, site: str | None) -> dict[str, Any]:
    """Return how the activations of an edit were read, where they are read again."""
    from sealign.models.prompt_format import prompt_format_of

    fit = edit.record.fit
    pattern = fit.get("module_pattern") if site in (None, edit.settings.site) else None
    return {"token": fit.get("token"), "prompt_format": prompt_format_of(fit), "module_pattern": pattern}


def _select(layers: str | None, depth: int) -> list[int]:
    from sealign.models.sites import select_layers

    return select_layers("all" if layers is None else layers, depth)


def _named(sources: Sequence[str]) -> dict[str, str]:
    """Return sources by a short name: a file's without folder and suffix, where no two are the same."""
    short = {Path(s).stem if s.endswith((".jsonl", ".csv")) else s: s for s in sources}
    return short if len(short) == len(set(sources)) else {source: source for source in sources}


def _model(name: str | None, dtype: str, device: str) -> tuple[Any, Any, int]:
    """Return a model, its tokenizer and its number of layers."""
    from sealign.models.embedded_model import EMBEDDED
    from sealign.models.loading import load_model
    from sealign.models.structure import text_config, unwrap_model

    with messages.status("Loading the model"):
        model, tokenizer = load_model(name or EMBEDDED, dtype=dtype, device=device)
    return model, tokenizer, text_config(unwrap_model(model)).num_hidden_layers


def _collect(
    model: Any, tokenizer: Any, demonstrations: Sequence[Demonstration], config: FitConfig, layers: Sequence[int]
) -> Activations:
    from sealign.cli.display import track
    from sealign.fitting.collecting import collect_activations

    return collect_activations(
        model,
        tokenizer,
        demonstrations,
        site=config.site,
        layers=layers,
        config=config.collect_config(),
        module_pattern=config.module_pattern,
        track=track,
    )


def _saved_spectra(source: str, layers: str | None) -> Spectra:
    """Return the spectra of an edit's layers, or of some of them."""
    from sealign.edits.edit import Edit
    from sealign.figures import projection_spectra

    edit = Edit.from_pretrained(source)
    if layers not in (None, "all"):
        depth = edit.record.model.fingerprint.get("num_hidden_layers")
        edit = edit.with_layers(_select(layers, depth if isinstance(depth, int) else edit.layers[-1] + 1))
    return projection_spectra(edit.projections)


def _save(figure: Figure, marks: Sequence[Mark], path: Path) -> None:
    from sealign.figures import save_figure, save_points

    written = [*save_figure(figure, path), save_points(marks, path)]
    output.print(f"Wrote {', '.join(map(str, written))}.", markup=False, soft_wrap=True)
