"""``sealign plot`` as a user runs it."""

from __future__ import annotations

import copy
import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sealign
import sealign.cli.plot  # registers the commands
from sealign import figures
from sealign.evaluation.comparison import report_edits
from sealign.figures import Point
from sealign.spectral.signature import layer_signature
from tests.cli import test_app as shared
from tests.cli.test_app import listing, passed, refused, replaced, run, write_rows
from tests.evaluation_data import planted_results, planted_sweep
from tests.tiny_models import build_model

cache = shared.cache
edit_folder = shared.edit_folder
model_folder = shared.model_folder
one_thread = shared.one_thread
rows = shared.rows

KINDS = ("tsne", "spectrum", "signature", "effect")
SUFFIXES = ("pdf", "png", "csv")


def read(path: Path) -> list[Point]:
    """The points of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return [Point(row["panel"], row["series"], float(row["x"]), float(row["y"])) for row in csv.DictReader(file)]


def collect(model_folder: Path, items: Any, **settings: Any) -> sealign.Activations:
    model, tokenizer = sealign.load_model(str(model_folder))
    return sealign.collect_activations(model, tokenizer, items, **settings)


def assert_written(printed: str, path: Path) -> None:
    """The three files are there, and named; nothing else is."""
    files = [Path(f"{path}.{suffix}") for suffix in SUFFIXES]
    assert printed == f"Wrote {', '.join(map(str, files))}.\n"
    assert listing(path.parent) == sorted(file.name for file in files)
    assert files[0].read_bytes().startswith(b"%PDF-")
    assert files[1].read_bytes().startswith(b"\x89PNG")


# --- figures ---


def test_sweep(tmp_path: Path) -> None:
    results = planted_sweep((0.5, 1.0))
    results.save(tmp_path)
    path = tmp_path / "figures" / "strengths"
    assert_written(passed("plot", "sweep", tmp_path, "--output", path), path)
    points = figures.sweep_points(results, report_edits(results), "mild")
    assert read(path.with_suffix(".csv")) == [Point(p.panel, p.series, p.x, p.y) for p in points]
    args = ("plot", "sweep", tmp_path / "results.json", "--output", tmp_path / "again")
    data = json.loads(passed(*args, "--name", "mild", "--json"))
    assert data["files"] == [str(tmp_path / f"again.{suffix}") for suffix in SUFFIXES]
    args = (*args[:-1], tmp_path / "none")
    refused(*args, "--name", "wild", words=("'wild' was not evaluated at several strengths", "found: mild"))
    planted_results().save(tmp_path)
    refused(*args, words=("several strengths", "--strength 0.5,1,2"))


def test_tsne(model_folder: Path, rows: Path, demonstrations: Any, tmp_path: Path) -> None:
    path = tmp_path / "figures" / "planes"
    args = ("plot", "tsne", "--model", model_folder, "--demonstrations", rows)
    assert_written(passed(*args, "--output", path, "--seed", 3), path)
    activations = collect(model_folder, demonstrations)
    points = figures.tsne_points(activations, (0, 2, 3), seed=3)  # first, middle and last of 4
    assert read(path.with_suffix(".csv")) == points
    for suffix in ("", *(f".{suffix}" for suffix in SUFFIXES)):
        other = tmp_path / f"other{suffix[1:]}" / "v1.2"
        assert_written(passed(*args, "--seed", 3, "--layers", "0,-1", "--output", f"{other}{suffix}"), other)
        found = read(Path(f"{other}.csv"))
        assert {mark.panel for mark in found} == {"layer 0", "layer 3"}
        assert found[:14] == points[:14]


def test_sites_and_joint_sources(model_folder: Path, rows: Path, demonstrations: Any, tmp_path: Path) -> None:
    more = [sealign.Demonstration(f"Is {n} odd?", "Maybe so.", "Nobody knows.") for n in range(4)]
    other = write_rows(tmp_path / "other.jsonl", list(more))
    path = tmp_path / "figures" / "residual"
    sources = ("--demonstrations", rows, "--demonstrations", other)
    args = ("--model", model_folder, *sources, "--site", "residual", "--layers", "last:2", "--output", path)
    assert_written(passed("plot", "spectrum", *args), path)
    activations = collect(model_folder, [*demonstrations, *more], site="residual", layers=(2, 3))
    found = read(path.with_suffix(".csv"))
    for layer in (2, 3):
        for panel, target in (("positives", activations.positive), ("negatives", activations.negative)):
            x, y = (block[layer].numpy().astype(np.float64) for block in (activations.neutral, target))
            values = [mark.y for mark in found if (mark.panel, mark.series) == (panel, f"layer {layer}")]
            expected = np.linalg.svd(x.T @ y / 11, compute_uv=False)
            np.testing.assert_allclose(values, expected[: len(values)], rtol=1e-5)
            assert len(values) == 11 or expected[len(values)] < 1e-12 * expected[0]


def test_a_centred_spectrum(model_folder: Path, rows: Path, demonstrations: Any, tmp_path: Path) -> None:
    path = tmp_path / "figure"
    args = ("--model", model_folder, "--demonstrations", rows, "--layers", "1", "--output", path)
    passed("plot", "spectrum", *args, "--centered")
    spectra = figures.activation_spectra(collect(model_folder, demonstrations, layers=(1,)), centered=True)
    found = [mark.y for mark in read(path.with_suffix(".csv")) if mark.panel == "positives"]
    assert found == pytest.approx(spectra[1][0].tolist(), rel=1e-6)


def test_files_are_named_as_json(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    args = ("--model", model_folder, "--demonstrations", rows, "--layers", "1", "--output", tmp_path / "figure")
    written = json.loads(passed("plot", "spectrum", *args, "--json"))
    assert written == {"files": [str(tmp_path / f"figure.{suffix}") for suffix in SUFFIXES]}


def test_signatures_of_several_sources(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    path = tmp_path / "figures" / "signature"
    sources = ("--demonstrations", rows, "--demonstrations", "bundled:fairness")
    args = (
        "plot",
        "signature",
        "--model",
        model_folder,
        *sources,
        "--demonstrations-limit",
        5,
        "--seed",
        2,
        "--output",
        path,
    )
    assert_written(passed(*args), path)
    found = read(path.with_suffix(".csv"))
    for name, source in (("rows", rows), ("bundled:fairness", "bundled:fairness")):
        items = sealign.load_demonstrations(source, limit=5, seed=2)
        found_rows = collect(model_folder, items)
        expected = [
            layer_signature(found_rows.positive[layer], found_rows.negative[layer]) for layer in found_rows.layers
        ]
        own = [(mark.x, mark.y) for mark in found if mark.series == name]
        assert [x for x, _ in own] == [0.25, 0.5, 0.75, 1.0]
        assert [y for _, y in own] == pytest.approx(expected, rel=1e-5)
    replaced(*args, "--layers", "1")
    assert {mark.x for mark in read(path.with_suffix(".csv"))} == {0.5}


def test_files_of_one_name_are_told_apart(model_folder: Path, demonstrations: Any, tmp_path: Path) -> None:
    sources = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        sources.append(write_rows(tmp_path / name / "rows.jsonl", list(demonstrations)))
    args = ("--demonstrations", sources[0], "--demonstrations", sources[1], "--output", tmp_path / "figure")
    passed("plot", "signature", "--model", model_folder, *args)
    assert {mark.series for mark in read(tmp_path / "figure.csv")} == set(map(str, sources))


def test_the_effect_of_an_edit(model_folder: Path, edit_folder: Path, rows: Path, tmp_path: Path) -> None:
    path = tmp_path / "figures" / "effect"
    args = (
        "plot",
        "effect",
        "--edit",
        edit_folder,
        "--demonstrations",
        rows,
        "--demonstrations-limit",
        6,
        "--output",
        path,
    )
    assert_written(passed(*args, "--layers", "1"), path)
    edit = sealign.Edit.from_pretrained(edit_folder)
    before = collect(model_folder, sealign.load_demonstrations(rows, limit=6), layers=(1,))
    # The first edited layer sees what it saw unedited, so that its edit is the projection alone.
    edited = edit.layer_edits[1](before.neutral[1], edit.strength)
    matrix = np.concatenate([b.numpy() for b in (before.positive[1], before.negative[1], before.neutral[1], edited)])
    centered = matrix.astype(np.float64) - matrix.mean(0, dtype=np.float64)
    left, values, _ = np.linalg.svd(centered, full_matrices=False)
    found = read(path.with_suffix(".csv"))
    points = np.array([(mark.x, mark.y) for mark in found])
    signs = np.sign((points * left[:, :2]).sum(0))
    np.testing.assert_allclose(points * signs, left[:, :2] * values[:2], rtol=1e-3, atol=1e-4 * values[0])
    share = (values[:2] ** 2).sum() / (values**2).sum()
    assert {mark.panel for mark in found} == {f"layer 1: {share:.0%} of variance"}
    assert [mark.series for mark in found[::6]] == ["positive", "negative", "neutral", "edited neutral"]
    # By default, the last edited layer.
    replaced(*args, "--embedding", "tsne")
    assert {mark.panel for mark in read(path.with_suffix(".csv"))} == {"layer 3"}
    # Below the first edited layer nothing changes.
    replaced(*args, "--layers", "0")
    found = read(path.with_suffix(".csv"))
    assert [(mark.x, mark.y) for mark in found[12:18]] == [(mark.x, mark.y) for mark in found[18:]]


def test_an_effect_is_read_as_the_edit_was_fitted(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    folder, path = tmp_path / "edit", tmp_path / "figure"
    fitted = ("--token", "mean", "--prompt-format", "plain", "--module-pattern", "model.layers.{layer}.mlp.down_proj")
    args = ("--demonstrations", rows, "--output")
    passed("fit", "--model", model_folder, *fitted, "--rank", 2, "--layers", "2", *args, folder)
    passed("plot", "effect", "--edit", folder, *args, path)
    model, tokenizer = sealign.load_model(str(model_folder))
    config = sealign.CollectConfig(token="mean", prompt_format=sealign.PromptFormat("plain"))
    settings: Any = {"layers": (2,), "config": config}
    items = sealign.load_demonstrations(rows)
    before = sealign.collect_activations(model, tokenizer, items, **settings)
    with sealign.apply_edit(model, sealign.load_edit(folder)):
        after = sealign.collect_activations(model, tokenizer, items, **settings)
    for mark, expected in zip(read(path.with_suffix(".csv")), figures.effect_points(before, after), strict=True):
        assert (mark.panel, mark.series) == (expected.panel, expected.series)
        assert (mark.x, mark.y) == pytest.approx((expected.x, expected.y), abs=1e-4)


# --- refusals ---


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_layers_sites_and_places(
    kind: str, model_folder: Path, edit_folder: Path, rows: Path, tmp_path: Path
) -> None:
    given = ("--edit", edit_folder) if kind == "effect" else ("--model", model_folder)
    args = ("plot", kind, *given, "--demonstrations", rows)
    out = ("--output", tmp_path / "new" / "figure")
    refused(*args, *out, "--layers", "7", words=("layer 7 is outside the model", "0 to 3"))
    refused(*args, *out, "--layers", "some", words=("layers is 'some'",))
    refused(*args, *out, "--layers", "signature:2", words=("--layers is 'signature:2'", "try all"))
    refused(*args, *out, "--site", "mpl", words=("unknown site 'mpl'", "did you mean 'mlp'"))
    refused(*args, *out, "--demonstrations", "nowhere.jsonl", words=("there is no file 'nowhere.jsonl'",))
    refused(*args, "--output", tmp_path, words=("is a folder, but a figure needs a name", "--output"))
    refused(*args, "--output", rows / "figure", words=(f"'{rows}' is a file", "choose another output"))
    assert listing(tmp_path) == ["rows.jsonl"]


@pytest.mark.usefixtures("model_folder")
def test_too_few_for_tsne(edit_folder: Path, rows: Path, tmp_path: Path) -> None:
    few = ("--demonstrations", rows, "--demonstrations-limit", 4, "--output", tmp_path / "figure")
    words = ("there are 4 demonstrations, but t-SNE needs at least 5",)
    refused("plot", "tsne", "--model", "nowhere", *few, words=words)  # before the model is loaded
    refused("plot", "effect", "--edit", edit_folder, "--model", "nowhere", *few, "--embedding", "tsne", words=words)
    args = ("plot", "effect", "--edit", edit_folder, *few)
    refused(*args, "--embedding", "pac", words=("unknown embedding 'pac'", "'pca'"))
    passed(*args)


def test_an_effect_needs_edited_activations(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    passed("fit", "--method", "dola", "--model", model_folder, "--output", tmp_path / "dola")
    args = ("--edit", tmp_path / "dola", "--demonstrations", rows, "--output", tmp_path / "figure")
    refused("plot", "effect", *args, words=("dola does not edit activations",))


def test_the_effect_of_other_methods_and_strengths(
    model_folder: Path, edit_folder: Path, rows: Path, tmp_path: Path
) -> None:
    shift, path = tmp_path / "shift", tmp_path / "figure"
    passed("fit", "--method", "mean_difference", "--model", model_folder, "--demonstrations", rows, "--output", shift)
    args = ("--demonstrations", rows, "--output", path)
    passed("plot", "effect", "--edit", shift, *args)
    assert {mark.panel.partition(":")[0] for mark in read(path.with_suffix(".csv"))} == {
        f"layer {sealign.load_edit(shift).record.layers.popitem()[0]}"
    }
    replaced("plot", "effect", "--edit", f"{shift}+{edit_folder}", *args, "--strength", 0)
    found = read(path.with_suffix(".csv"))
    points = {name: [(m.x, m.y) for m in found if m.series == name] for name in ("neutral", "edited neutral")}
    assert points["neutral"] == points["edited neutral"]


def test_an_edit_of_another_model(edit_folder: Path, rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    settings = {"vocab_size": len(tokenizer), "max_position_embeddings": shared.CONTEXT, "intermediate_size": 72}
    build_model("llama", **settings).save_pretrained(other)
    tokenizer.save_pretrained(other)
    args = ("plot", "effect", "--edit", edit_folder, "--model", other, "--demonstrations", rows)
    out = ("--output", tmp_path / "figure")
    words = ("the edit was fitted on", "intermediate_size is 72", "--ignore-mismatch")
    refused(*args, *out, words=words)
    assert not list(tmp_path.glob("figure*"))
    passed(*args, *out, "--ignore-mismatch")


def test_another_chat_template_is_said(edit_folder: Path, rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    model, _ = sealign.load_model(sealign.load_edit(edit_folder).base_model.id)
    other = copy.deepcopy(tokenizer)
    other.chat_template += "{# another #}"
    for part in (model, other):
        part.save_pretrained(tmp_path / "other")
    args = ("plot", "effect", "--edit", edit_folder, "--model", tmp_path / "other", "--demonstrations", rows)
    result = run(*args, "--output", tmp_path / "figure")
    assert "this tokenizer has another chat template" in str(result.exception)
    passed(*args, "--output", tmp_path / "figure", "--ignore-mismatch")


def test_without_the_extra(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    for kind in KINDS:
        edit = ("--edit", "x") if kind == "effect" else ()
        args = ("--demonstrations", rows, "--output", tmp_path / "figure")
        refused("plot", kind, *edit, *args, words=("pip install 'sealign[figures]'",))
