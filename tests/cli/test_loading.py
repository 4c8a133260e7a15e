"""The options that load models and edits, and ``sealign evaluate --method``."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from sealign.cli import options
from sealign.cli.loading import ModelOptions, parse_name, parse_names, with_model_options
from sealign.cli.option_values import named_values
from sealign.edits.edit import Edit
from sealign.errors import SettingError
from sealign.evaluation.results import Results
from sealign.models import loading
from tests.cli import test_app as shared
from tests.cli.test_app import passed, refused
from tests.edits.edit_data import make_affine, make_record
from tests.evaluation_data import HARNESS_WARNINGS, write_truthfulqa

cache = shared.cache
edit_folder = shared.edit_folder
model_folder = shared.model_folder
one_thread = shared.one_thread

pytestmark = HARNESS_WARNINGS

LEARNT = ["--demonstrations", "bundled:truthfulness", "--demonstrations-limit", "6"]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_truthfulqa(folder)
    return folder


def test_the_decorator_gives_a_command_the_options_of_a_model() -> None:
    seen: list[Any] = []

    @with_model_options(options.EditedModel)
    def command(model: ModelOptions, edit: options.Edit, seed: options.Seed = 0, **own: Any) -> None:
        """Do something."""
        seen.append((model, edit, seed, own))

    names = list(inspect.signature(command).parameters)
    loading = ["revision", "trust_remote_code", "attn_implementation", "quantization", "dtype", "device"]
    assert names == ["model", "edit", "seed", *loading]
    assert command.__doc__ == "Do something."
    values: dict[str, Any] = dict(zip(loading, ["r", True, "sdpa", "8bit", "float32", "cpu"], strict=True))
    command(model="m", edit="e", seed=1, other=2, **values)
    chosen = ModelOptions("m", **values)
    assert seen == [(chosen, "e", 1, {"other": 2})]
    assert chosen.arguments()["quantization_config"].load_in_8bit


def test_the_model_of_an_edit_is_loaded_at_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    monkeypatch.setattr(loading, "load_model", lambda name, **given: calls.append((name, given["revision"])))
    edit = Edit({1: make_affine(), 3: make_affine()}, make_record())
    for name, revision in ((None, None), (None, "main"), ("other", None)):
        ModelOptions(name, revision, False, None, None, "auto", "auto").or_base_of(edit).load()
    assert calls == [("owner/tiny-llama", "0f3c"), ("owner/tiny-llama", "main"), ("other", None)]
    assert ModelOptions(None, None, False, None, None, "auto", "auto").or_base_of(None).name is None


def test_names_of_edits() -> None:
    assert parse_name("mild=edits/one+two") == ("mild", "edits/one+two")
    assert parse_name("edits/truth") == ("truth", "edits/truth")
    assert parse_name("a/b=c") == ("b=c", "a/b=c")
    assert parse_names(["x=a", "b"], "--edit") == {"x": "a", "b": "b"}
    with pytest.raises(
        SettingError, match=r"two values of --edit have the name 'b'; name them, as in --edit other=c/b"
    ):
        parse_names(["b", "c/b"], "--edit")


def test_values_of_set() -> None:
    assert named_values(["heads=2", "prompt_format.style = chat", "prompt=a=b"]) == {
        "heads": "2",
        "prompt_format.style": "chat",
        "prompt": "a=b",
    }
    assert named_values(None) == {}
    for text in ("heads", "heads=", "=2"):
        with pytest.raises(SettingError, match=f"--set is '{text}'"):
            named_values([text])


@pytest.mark.slow
def test_evaluate_methods_beside_an_edit(edit_folder: Path, local: Path, tmp_path: Path) -> None:
    methods = ("--method", "mean_difference", "--method", "few=icl")
    args: list[object] = ["evaluate", "--edit", f"mild={edit_folder}", *methods, *LEARNT]
    args += ["--tasks", "truthfulqa_mc2", "--data-dir", local, "--control-seeds", "0", "--output", tmp_path / "out"]
    printed = passed(*args)
    assert "mean_difference" in printed
    results = Results.load(tmp_path / "out")
    assert results.edits == ["mild", "mean_difference", "few"]
    assert {name: arm.method for name, arm in results.arms.items() if arm.kind == "edit"} == {
        "mild": "sea",
        "mean_difference": "mean_difference",
        "few": "icl",
    }
    assert results.arms["mean_difference"].fit_seconds is not None
    assert results.controls("mean_difference", "random") == ["mean_difference random 0"]
    assert results.controls("mean_difference", "reversed") == ["mean_difference reversed"]
    assert results.controls("few", "random") == []
    values = {arm: results.tasks["truthfulqa_mc2"].metrics["mc2"].value(arm) for arm in results.arms}
    assert len(set(values.values())) == len(values)
    assert passed(*args) == printed  # read back, not fitted again


@pytest.mark.slow
def test_compositions_in_an_evaluation(edit_folder: Path, model_folder: Path, local: Path, tmp_path: Path) -> None:
    shift = tmp_path / "shift"
    passed("fit", "--method", "mean_difference", "--model", model_folder, *LEARNT, "--output", shift)
    args: list[object] = ["--tasks", "truthfulqa_mc2", "--data-dir", local, "--output", tmp_path / "out"]
    edits = ("--edit", f"both={edit_folder}+{shift}", "--edit", f"alone={edit_folder}")
    data = json.loads(passed("evaluate", *edits, *args, "--control-seeds", "", "--no-reversed", "--json"))
    assert [edit["name"] for edit in data["edits"]] == ["both", "alone"]
    results = Results.load(tmp_path / "out")
    assert set(results.arms) == {"base", "both", "alone"}
    assert results.arms["both"].method == "sea+mean_difference"
    metric = results.tasks["truthfulqa_mc2"].metrics["mc2"]
    assert metric.value("both") != metric.value("alone")


def test_methods_that_cannot_be_evaluated(model_folder: Path, local: Path, tmp_path: Path) -> None:
    args: list[object] = ["evaluate", "--tasks", "truthfulqa_mc2", "--data-dir", local, "--output", tmp_path / "o"]
    args += ["--model", model_folder]
    words = ("two values of --method have the name 'dola'", "--method other=dola")
    refused(*args, "--method", "dola", "--method", "dola", words=words)
    refused(*args, "--method", "mean_difference", words=("mean_difference needs at least 2",))
    refused(*args, "--method", "itti", words=("unknown method 'itti' (did you mean 'iti'?)",))
    refused(*args, "--method", "cd", words=("amateur is empty",))
    assert not (tmp_path / "o").exists()
