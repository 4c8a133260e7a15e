"""``sealign plot``: figures of activations, spectra, signatures, effect and strength of an edit, with their data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sealign.cli import option_values, options
from sealign.cli.app import Commands, add_group, require_extra
from sealign.cli.consoles import output
from sealign.cli.loading import ModelOptions, load_edit, with_default, with_model_options

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sealign.demonstrations.demonstration import Demonstration
    from sealign.figures import Point
    from sealign.fitting.activations import Activations
    from sealign.fitting.edit_config import EditConfig

plots: Commands = add_group("plot", "Draw activations, spectra, signatures, or what an edit does.")

_SUFFIXES = (".pdf", ".png", ".csv")


SomeLayers = Annotated[str | None, with_default(options.Layers, "first, middle and last")]
AllLayers = Annotated[str | None, with_default(options.Layers, "all")]
LastLayer = Annotated[str | None, with_default(options.Layers, "the last edited layer")]
Site = Annotated[str | None, with_default(options.Site, "mlp")]
EditSite = Annotated[str | None, with_default(options.Site, "the site of the edit")]
Embedding = Annotated[
    str,
    typer.Option(
        "--embedding",
        metavar="NAME",
        help="Method of projection to two dimensions: pca (linear) or tsne (preserves neighbourhoods, not distances).",
    ),
]


@plots.command()
@with_model_options()
def tsne(
    model: ModelOptions,
    output_path: options.Output,
    demonstrations: options.Demonstrations,
    data_dir: options.DataDir = None,
    columns: options.Columns = None,
    demonstrations_limit: options.DemonstrationsLimit = None,
    layers: SomeLayers = None,
    site: Site = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Draw positive and negative activations in two dimensions by t-SNE, one panel per layer.

    The figure is written as PATH.pdf and PATH.png, and the plotted points as PATH.csv.
    """
    require_extra("figures", "matplotlib", "sklearn")
    from sealign import figures

    path, config = _path(output_path, demonstrations, overwrite), _config(layers, site, seed)
    used = option_values.load_sources(demonstrations, data_dir, demonstrations_limit, seed, columns)
    figures.check_embedding("tsne", len(used))
    base, tokenizer = model.load()
    chosen = figures.first_middle_last(range(_depth(base))) if layers is None else _select(layers, base)
    points = figures.tsne_points(_collect(base, tokenizer, used, config, chosen), chosen, seed=seed)
    _save(figures.plane(points, "tsne"), points, path, json)


@plots.command()
@with_model_options()
def spectrum(
    model: ModelOptions,
    output_path: options.Output,
    demonstrations: options.Demonstrations,
    data_dir: options.DataDir = None,
    columns: options.Columns = None,
    demonstrations_limit: options.DemonstrationsLimit = None,
    layers: AllLayers = None,
    site: Site = None,
    centered: Annotated[
        bool, typer.Option("--centered", help="Subtract the mean from each activation matrix before the decomposition.")
    ] = False,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Draw the singular values of SEA's cross-covariances, one line per layer.

    The figure is written as PATH.pdf and PATH.png, and the plotted points as PATH.csv.
    """
    require_extra("figures", "matplotlib", "sklearn")
    from sealign import figures

    path, config = _path(output_path, demonstrations, overwrite), _config(layers, site, seed)
    used = option_values.load_sources(demonstrations, data_dir, demonstrations_limit, seed, columns)
    base, tokenizer = model.load()
    found = _collect(base, tokenizer, used, config, _select(layers, base))
    spectra = figures.activation_spectra(found, centered=centered)
    _save(figures.spectrum(spectra), figures.spectrum_points(spectra), path, json)


@plots.command()
@with_model_options()
def signature(
    model: ModelOptions,
    output_path: options.Output,
    demonstrations: options.Demonstrations,
    data_dir: options.DataDir = None,
    columns: options.Columns = None,
    demonstrations_limit: options.DemonstrationsLimit = None,
    layers: AllLayers = None,
    site: Site = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Draw the signature of each layer, one line per source of demonstrations.

    The signature of a layer measures how strongly its activations are associated with the labels. The figure is
    written as PATH.pdf and PATH.png, and the plotted points as PATH.csv.
    """
    require_extra("figures", "matplotlib", "sklearn")
    from sealign import figures

    path, config = _path(output_path, demonstrations, overwrite), _config(layers, site, seed)
    used = {
        name: option_values.load_sources([source], data_dir, demonstrations_limit, seed, columns)
        for name, source in _labels(demonstrations).items()
    }
    base, tokenizer = model.load()
    chosen = _select(layers, base)
    signatures = {
        name: figures.activation_signatures(_collect(base, tokenizer, items, config, chosen))
        for name, items in used.items()
    }
    depths = dict.fromkeys(signatures, _depth(base))
    points = figures.signature_points(signatures, depths=depths)
    _save(figures.signature(signatures, depths=depths), points, path, json)


@plots.command()
@with_model_options(options.EditedModel)
def effect(
    model: ModelOptions,
    output_path: options.Output,
    edit: options.Edit,
    demonstrations: options.Demonstrations,
    data_dir: options.DataDir = None,
    columns: options.Columns = None,
    demonstrations_limit: options.DemonstrationsLimit = None,
    strength: options.Strength = None,
    layers: LastLayer = None,
    site: EditSite = None,
    embedding: Embedding = "pca",
    seed: options.Seed = 0,
    ignore_mismatch: options.IgnoreMismatch = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Draw neutral activations before and after an edit, with positives and negatives, one panel per layer.

    The neutral text is the prompt alone, which is the same before and after the edit. The figure is written as PATH.pdf
    and PATH.png, and the plotted points as PATH.csv.
    """
    require_extra("figures", "matplotlib", "sklearn")
    from sealign import figures
    from sealign.edits.attach import apply_edit
    from sealign.edits.provenance import warn_of_other_tokenizer
    from sealign.methods.edit_sources import collection_of, edited_layers

    path, loaded = _path(output_path, demonstrations, overwrite), load_edit(edit, strength)
    fitted = collection_of(loaded)
    pattern = fitted.module_pattern if site in (None, fitted.site) else None
    checked = _config(layers, site or fitted.site, seed)
    config = fitted.replace(site=checked.site, seed=seed, neutral="prompt", module_pattern=pattern)
    used = option_values.load_sources(demonstrations, data_dir, demonstrations_limit, seed, columns)
    figures.check_embedding(embedding, len(used))
    base, tokenizer = model.or_base_of(loaded).load()
    if not ignore_mismatch:
        warn_of_other_tokenizer(tokenizer, loaded)
    chosen = edited_layers(loaded)[-1:] if layers is None else _select(layers, base)
    # The edited run is first, so that an edit of another model is refused before anything slow.
    with apply_edit(base, loaded, ignore_mismatch=ignore_mismatch):
        after = _collect(base, tokenizer, used, config, chosen)
    before = _collect(base, tokenizer, used, config, chosen)
    points = figures.effect_points(before, after, chosen, embedding=embedding, seed=seed)  # type: ignore[arg-type]
    _save(figures.plane(points, embedding), points, path, json)  # type: ignore[arg-type]


@plots.command()
def sweep(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="Folder or results.json of an evaluation.")],
    output_path: options.Output,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="NAME",
            help=r"Name of the edit in the evaluation. \[default: the only one with several strengths]",
        ),
    ] = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Draw gain, damage and measures of answers against the strength of an edit, with its controls.

    The evaluation is one of sealign evaluate with several strengths, as in --strength 0.5,1,2. The figure is written as
    PATH.pdf and PATH.png, and the plotted points as PATH.csv.
    """
    require_extra("figures", "matplotlib", "sklearn")
    from sealign import figures
    from sealign.errors import SettingError
    from sealign.evaluation.comparison import report_edits
    from sealign.evaluation.results import Results

    path = _path(output_path, [str(results)], overwrite)
    found = Results.load(results)
    names = figures.sweeps(found)
    if name is None and len(names) > 1:
        raise SettingError(f"the evaluation varies the strength of {', '.join(names)}; name one with --name")
    points = figures.sweep_points(found, report_edits(found, seed=seed), name or next(iter(names), "the edit"))
    _save(figures.sweep(points), points, path, json)


def _path(output_path: Path, demonstrations: Sequence[str], overwrite: bool) -> Path:
    """Return the path of the figure without suffix, checked before anything slow starts."""
    from sealign.cli.outputs import check_output_files
    from sealign.errors import SettingError

    path = output_path.with_suffix("") if output_path.suffix in _SUFFIXES else output_path
    if path.is_dir():
        raise SettingError(f"'{path}' is a folder, but a figure needs a name; try --output {path / 'figure'}")
    written = [Path(f"{path}{suffix}") for suffix in _SUFFIXES]
    check_output_files(written, overwrite=overwrite, sources=demonstrations)
    return path


def _config(layers: str | None, site: str | None, seed: int) -> EditConfig:
    """Return the settings of the collection; a wrong layer or site raises an error before anything slow starts."""
    from sealign.errors import SettingError
    from sealign.fitting.edit_config import EditConfig

    given: dict[str, Any] = {"layers": layers, "site": site}
    config = EditConfig(seed=seed, **{name: value for name, value in given.items() if value is not None})
    if config.chooses_by_signature:
        raise SettingError(f"--layers is '{layers}', but a figure needs layers by position; try all or last:8")
    return config


def _depth(model: PreTrainedModel) -> int:
    from sealign.models.structure import text_config, unwrap_model

    return int(text_config(unwrap_model(model)).num_hidden_layers)


def _select(layers: str | None, model: PreTrainedModel) -> list[int]:
    from sealign.models.sites import select_layers

    return select_layers("all" if layers is None else layers, _depth(model))


def _labels(sources: Sequence[str]) -> dict[str, str]:
    """Return sources by a short label: the stem of a file's name, unless two sources have the same."""
    short = {Path(s).stem if s.endswith((".jsonl", ".csv")) else s: s for s in sources}
    return short if len(short) == len(set(sources)) else {source: source for source in sources}


def _collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    config: EditConfig,
    layers: Sequence[int],
) -> Activations:
    """Collect activations with a progress bar."""
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


def _save(figure: Figure, points: Sequence[Point], path: Path, json: bool) -> None:
    from sealign.cli.display import print_json
    from sealign.figures import save_figure, save_points

    written = [str(file) for file in [*save_figure(figure, path), save_points(points, path)]]
    if json:
        print_json({"files": written})
    else:
        output.print(f"Wrote {', '.join(written)}.", markup=False, soft_wrap=True)
