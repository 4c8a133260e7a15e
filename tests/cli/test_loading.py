"""``sealign baseline``, and its results in ``generate`` and ``evaluate``, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sealign.cli.loading import seed_setting
from sealign.evaluation.results import Results
from tests.cli import test_app as shared
from tests.cli.test_app import passed, refused
from tests.evaluation_data import HARNESS_WARNINGS, write_truthfulqa

cache = shared.cache
edit_folder = shared.edit_folder
model_folder = shared.model_folder
one_thread = shared.one_thread

pytestmark = [pytest.mark.slow, *HARNESS_WARNINGS]

LEARNT = ["--demonstrations", "bundled:truthfulness", "--limit", "6"]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_truthfulqa(folder)
    return folder


def test_fit_save_and_generate(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "iti"
    args: list[object] = ["baseline", "iti", "--model", model_folder, *LEARNT, "--set", "heads=2", "--output", folder]
    printed = passed(*args)
    assert "Fitted iti in" in printed
    assert f"sealign generate --edit {folder}" in " ".join(printed.split())
    record = json.loads(passed(*args, "--json"))
    assert record["settings"]["heads"] == 2
    assert record["demonstrations_count"] == 6
    assert record == json.loads((folder / "method.json").read_text())
    (answer,) = json.loads(passed("generate", "--edit", folder, "--prompt", "Who?", "--max-new-tokens", "4", "--json"))
    assert answer.keys() == {"prompt", "base", "edited"}
    refused("generate", "--edit", folder, "--prompt", "Who?", "--strength", "2", words=("only spectral edits",))
    chatted = passed("chat", "--edit", folder, "--max-new-tokens", "4", stdin="/off\nWho?\n/strength 2\n/on\n/quit\n")
    assert "(edit off)" in chatted
    assert "only spectral edits have a strength" in " ".join(chatted.split())


def test_demonstrations_in_the_context(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "icl"
    passed("baseline", "icl", "--model", model_folder, *LEARNT, "--set", "shots=1", "--output", folder)
    (answer,) = json.loads(passed("generate", "--edit", folder, "--prompt", "Who?", "--max-new-tokens", "4", "--json"))
    assert answer["base"] != answer["edited"]


def test_the_seed_reaches_what_is_random() -> None:
    assert seed_setting("iti", 3) == seed_setting("icl", 3) == seed_setting("lora_ft", 3) == {"seed": "3"}
    assert seed_setting("icd", 3) == {"training.seed": "3"}
    assert seed_setting("caa", 3) == seed_setting("dola", 3) == {}


def test_a_training_is_kept_and_gone_on_with(model_folder: Path, tmp_path: Path, cache: Path) -> None:
    args = ["baseline", "lora_ft", "--model", model_folder, *LEARNT, "--set", "epochs=1", "--set", "rank=2"]
    first = json.loads(passed(*args, "--output", tmp_path / "one", "--json"))
    assert list(cache.glob("trainings/*/checkpoint-*"))
    second = json.loads(passed(*args, "--output", tmp_path / "two", "--json"))
    assert first["tensors_hash"] == second["tensors_hash"]


def test_evaluate_methods_beside_an_edit(edit_folder: Path, local: Path, tmp_path: Path) -> None:
    args: list[object] = ["evaluate", "--edit", f"mild={edit_folder}", "--method", "caa", "--method", "few=icl"]
    args += ["--demonstrations", "bundled:truthfulness", "--tasks", "truthfulqa_mc2", "--data-dir", local]
    args += ["--control-seeds", "0", "--output", tmp_path / "out"]
    printed = passed(*args)
    assert "caa" in printed
    results = Results.load(tmp_path / "out")
    assert results.edits == ["mild", "caa", "few"]
    assert {name: arm.method for name, arm in results.arms.items() if arm.kind == "edit"} == {
        "mild": None,
        "caa": "caa",
        "few": "icl",
    }
    assert results.arms["caa"].fit_seconds is not None
    assert results.controls("caa", "random") == ["caa random 0"]
    assert results.controls("caa", "reversed") == ["caa reversed"]
    assert results.controls("few", "random") == []
    values = {arm: results.tasks["truthfulqa_mc2"].metrics["mc2"].value(arm) for arm in results.arms}
    assert len(set(values.values())) == len(values)
    assert passed(*args) == printed  # read back, not fitted again


def test_stacked_in_an_evaluation(edit_folder: Path, model_folder: Path, local: Path, tmp_path: Path) -> None:
    passed("baseline", "caa", "--model", model_folder, *LEARNT, "--output", tmp_path / "caa")
    both = f"both={edit_folder}+{tmp_path / 'caa'}"
    args: list[object] = ["--tasks", "truthfulqa_mc2", "--data-dir", local, "--output", tmp_path / "out"]
    passed("evaluate", "--edit", both, "--edit", f"alone={edit_folder}", *args, "--control-seeds", "", "--no-reversed")
    results = Results.load(tmp_path / "out")
    assert results.arms["both"].method == "sea+caa"
    metric = results.tasks["truthfulqa_mc2"].metrics["mc2"]
    assert metric.value("both") != metric.value("alone")


def test_errors(model_folder: Path, local: Path, tmp_path: Path) -> None:
    base: list[object] = ["baseline", "--model", model_folder, "--output", tmp_path / "new"]
    refused(*base, "itti", words=("did you mean 'iti'",))
    refused(*base, "iti", "--set", "heads", words=("--set is 'heads'",))
    refused(*base, "iti", "--set", "heads=x", words=("must be a number",))
    refused(*base, "caa", words=("needs at least 2",))
    refused(*base, "cd", words=("needs an amateur",))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    refused("baseline", "dola", "--model", model_folder, "--output", tmp_path / "full", words=("not ours",))
    evaluate: list[object] = ["evaluate", "--tasks", "truthfulqa_mc2", "--data-dir", local, "--output", tmp_path / "o"]
    evaluate += ["--model", model_folder]
    refused(*evaluate, "--method", "dola", "--method", "dola", words=("two edits or methods",))
    refused(*evaluate, "--method", "caa", words=("needs at least 2",))
    assert not (tmp_path / "new").exists()
