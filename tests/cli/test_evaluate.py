"""``sealign evaluate``, ``compare`` and ``tune`` as a user runs them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

import sealign
from sealign.cli.consoles import output
from sealign.cli.tune import STAGES
from sealign.evaluation.comparison import report_edits
from sealign.evaluation.results import Results
from tests.cli import test_app as shared
from tests.cli.test_app import passed, refused, run, table_rows
from tests.evaluation.planted import planted_demonstrations, planted_model
from tests.evaluation_data import HARNESS_WARNINGS, planted_results, write_rows, write_truthfulqa

cache = shared.cache
edit_folder = shared.edit_folder
model_folder = shared.model_folder
one_thread = shared.one_thread

pytestmark = [pytest.mark.slow, *HARNESS_WARNINGS]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_truthfulqa(folder)
    return folder


@pytest.fixture
def evaluated(edit_folder: Path, local: Path, tmp_path: Path) -> tuple[Path, list[object]]:
    """A finished evaluation, and the arguments that make it."""
    args: list[object] = ["evaluate", "--edit", f"mild={edit_folder}", "--tasks", "truthfulqa_mc1,truthfulqa_mc2"]
    args += ["--data-dir", local, "--control-seeds", "0,3", "--output", tmp_path / "out"]
    passed(*args)
    return tmp_path / "out", args


def test_evaluate(evaluated: tuple[Path, list[object]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, args = evaluated
    assert {entry.name for entry in folder.iterdir()} == {
        "results.json",
        "report.html",
        "table.csv",
        "figures",
        "journal",
    }
    results = Results.load(folder)
    (report,) = report_edits(results)
    data = json.loads(passed(*args, "--json"))
    (edit,) = data["edits"]
    assert edit["name"] == "mild"
    assert edit["verdict"]["sentence"] == report.verdict.sentence
    rows = {row["metric"]: row for row in edit["rows"]}
    assert rows["mc2"]["difference"]["difference"] == report.headlines[1].difference.difference  # type: ignore[union-attr]
    for width in (80, 120):
        monkeypatch.setattr(output, "width", width)
        text = passed(*args)
        assert "…" not in text
        assert report.verdict.sentence in " ".join(text.split())
        for row in report.headlines:
            assert row.name in text
            assert row.difference is not None
            assert f"[{row.difference.low:+.3f}, {row.difference.high:+.3f}]" in text
        assert f"{report.damage['mild'].loss_increase:+.3f}" in text


def test_compare(evaluated: tuple[Path, list[object]], tmp_path: Path) -> None:
    folder, args = evaluated
    other = [*args[:-1], tmp_path / "strong", "--strength", 1.0]
    passed(*other)
    data = json.loads(passed("compare", folder, tmp_path / "strong" / "results.json", "--json"))
    assert [(pair["a"], pair["b"]) for pair in data] == [("base", "base"), ("mild", "mild")]
    assert all(row["difference"]["difference"] == 0 for row in data[0]["rows"])
    first, second = Results.load(folder), Results.load(tmp_path / "strong")
    row = next(row for row in data[1]["rows"] if row["metric"] == "mc2")
    values = [found.tasks["truthfulqa_mc2"].metrics["mc2"].value("mild") for found in (first, second)]
    assert row["difference"]["difference"] == pytest.approx(values[1] - values[0])
    text = passed("compare", folder, tmp_path / "strong")
    assert "B - A" in text
    assert f"{values[0]:.3f}" in text
    refused("compare", folder, tmp_path / "nothing", words=("there are no results at", "nothing'"))
    planted_results().save(tmp_path)
    refused("compare", folder, tmp_path, words=("item 0 of task 'truthfulqa_mc2' differs between the evaluations",))


def test_comparing_an_evaluation_with_itself_says_so(tmp_path: Path) -> None:
    for name, gain in (("first", 0.05), ("copy", 0.05), ("other", 0.04)):
        (tmp_path / name).mkdir()
        planted_results(gain).save(tmp_path / name)
    for folder in ("first", "copy"):
        result = run("compare", tmp_path / "first", tmp_path / folder)
        assert (result.exit_code, result.stderr.count("\n")) == (0, 1)
        assert "A and B hold the same results" in result.stderr
    passed("compare", tmp_path / "first", tmp_path / "other")


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    results = planted_results(0.05)
    results.tasks["truthfulqa_mc2"].metrics["mc2"].arms["mild"].numerators[7] = None
    results.damage["mild"].divergence[0] = None
    results.save(tmp_path)
    (tmp_path / "finite").mkdir()
    planted_results(0.05).save(tmp_path / "finite")
    data = json.loads(passed("compare", tmp_path / "finite", tmp_path, "--json"), parse_constant=pytest.fail)
    row = next(row for row in data[1]["rows"] if row["metric"] == "mc2")
    assert (row["edited"], row["difference"], row["broken"]) == (None, None, 1)
    assert "not finite in 1 item" in passed("compare", tmp_path / "finite", tmp_path)


def test_the_base_model_alone(model_folder: Path, local: Path, tmp_path: Path) -> None:
    args = ("--model", model_folder, "--tasks", "truthfulqa_mc2", "--data-dir", local, "--limit", 4)
    text = passed("evaluate", *args, "--output", tmp_path / "out")
    value = Results.load(tmp_path / "out").tasks["truthfulqa_mc2"].metrics["mc2"].value("base")
    assert ["truthfulqa_mc2 mc2", "4", f"{value:.3f}"] in [
        row for row in table_rows(text) if row
    ] or f"{value:.3f}" in text


def test_a_local_judge(edit_folder: Path, model_folder: Path, local: Path, tmp_path: Path) -> None:
    args: list[object] = ["evaluate", "--edit", edit_folder, "--tasks", "truthfulqa_gen", "--data-dir", local]
    args += ["--limit", 2, "--control-seeds", "", "--no-reversed", "--output"]
    text = passed(*args, tmp_path / "without")
    assert "Truth and Info were not computed, because no judge was named" in " ".join(text.split())
    passed(*args, tmp_path / "with", "--judge", model_folder)
    task = Results.load(tmp_path / "with").tasks["truthfulqa_gen"]
    assert {"truth", "info", "truth*info"} <= set(task.metrics)
    assert not any("judge" in note for note in task.notes)


def test_refusals(edit_folder: Path, local: Path, tmp_path: Path) -> None:
    args: list[object] = [
        "evaluate",
        "--edit",
        edit_folder,
        "--data-dir",
        local,
        "--output",
        tmp_path / "out",
        "--tasks",
    ]
    refused(*args, "truthfulqa_mc", words=("unknown task 'truthfulqa_mc'", "did you mean 'truthfulqa_mc"))
    refused(*args, "bbq", words=("task 'bbq' needs the file", "check --data-dir"))
    refused(*args, ",", words=("--data-dir is", "nothing is read from it, neither tasks nor one of the data sets"))
    refused(*args[:3], *args[5:7], words=("no tasks, no demonstrations and no prompts",))
    refused(*args, "truthfulqa_mc1", "--control-seeds", "a", words=("--control-seeds is 'a'", "must be integers"))
    refused(
        *args, "truthfulqa_mc1", "--edit", edit_folder, words=("two values of --edit have the name", "--edit other=")
    )
    refused(*args, "truthfulqa_gen", "--judge-url", "http://x/v1", words=("--judge-url needs the judge's name",))
    refused(*args, "truthfulqa_mc1", "--judge", "smollm2", words=("--judge is for answers to --prompts or the task",))
    for option, value in (("--columns", "prompt=question"), ("--demonstrations-limit", 3)):
        refused(*args, "truthfulqa_mc1", option, value, words=(f"{option} is for --demonstrations, of which there",))
    base = ["evaluate", *args[3:], "truthfulqa_mc1"]
    for given in (["--control-seeds", 0], ["--no-reversed"], ["--max-damage", 0.1]):
        refused(*base, *given, words=(f"{given[0]} is for an edit, but there is no --edit and no --method; leave it",))
    refused(*args, "truthfulqa_mc1", "--edit", "no/where/at/all", words=("there is no folder 'no/where/at/all'",))
    assert not (tmp_path / "out" / "results.json").exists()


def test_tune(tokenizer: Any, tmp_path: Path) -> None:
    planted_model(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": d.prompt, "positive": d.positive, "negative": d.negative} for d in planted_demonstrations(30)]
    write_rows(tmp_path, "learn.jsonl", rows)
    args: list[object] = ["tune", "--model", tmp_path / "model", "--demonstrations", tmp_path / "learn.jsonl"]
    args += ["--methods", "mean_difference,sea", "--sites", "residual", "--tokens", "last", "--layers", "2,3"]
    args += ["--finalists", 2, "--output", tmp_path / "out"]
    result = run(*args)
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        "30 demonstrations are split by prompt into three parts: to fit, to compare and to test.",
        *STAGES.values(),
    ]
    text = " ".join(result.stdout.split())
    assert "The most efficient of 6 candidates" in text
    data = json.loads(run(*args[:-1], tmp_path / "again", "--json").stdout)
    assert len(data["scan"]) == 6
    assert len(data["finalists"]) == 2
    assert (tmp_path / "out" / "figures" / "layer_map.png").is_file()
    assert (tmp_path / "out" / "scan.csv").is_file()
    assert data["winner"] is not None
    sentence = data["evaluation"]["edits"][0]["verdict"]["sentence"]
    assert f"\n## Effect\n\n**{sentence}**\n" in (tmp_path / "out" / "edit" / "README.md").read_text()
    assert f"Winner: {data['winner']['config']['method']}" in text
    edit = sealign.load_edit(tmp_path / "out" / "edit")
    assert edit.record.site == data["winner"]["config"]["site"]
    page = (tmp_path / "out" / "evaluation" / "report.html").read_text()
    assert page.index("Gain against") < page.index("data:image/png;base64,") < page.index("<em>winner</em>")
    layer_map = (tmp_path / "out" / "figures" / "layer_map.png").read_bytes()
    assert base64.b64encode(layer_map).decode() in page
    assert data["evaluation"]["edits"][0]["verdict"]["word"] in text.lower()
    refused(*args, words=("scan.csv' exists already", "--overwrite"))
    args[-1] = tmp_path / "refused"
    refused(*args, "--max-damage", 0, words=("max_damage is 0", "above 0"))
    unknown = ["sea,icl" if value == "mean_difference,sea" else value for value in args]
    refused(*unknown, words=("unknown method 'icl'",))


def test_demonstrations_that_were_fitted_on_are_not_scored(
    model_folder: Path, tmp_path: Path, demonstrations: list[sealign.Demonstration]
) -> None:
    rows = [{"prompt": d.prompt, "positive": d.positive, "negative": d.negative} for d in demonstrations]
    write_rows(tmp_path, "own.jsonl", rows)
    file = tmp_path / "own.jsonl"
    passed(
        "fit", "--model", model_folder, "--method", "mean_difference", "--demonstrations", file, "--holdout", 0.4,
        "--strength", 0.5, "--output", tmp_path / "edit",
    )  # fmt: skip
    args: list[object] = ["evaluate", "--edit", tmp_path / "edit", "--demonstrations", file, "--control-seeds", "0"]
    data = json.loads(passed(*args, "--output", tmp_path / "out", "--json"))
    results = Results.load(tmp_path / "out")
    kept = set(sealign.load_edit(tmp_path / "edit").record.fitted_on)
    expected = [item.prompt for item in demonstrations if item.hash not in kept]
    assert results.tasks["preference"].questions == expected
    assert len(expected) == 3
    assert set(data["edits"][0]["domain_divergence"]) == {"edit", "edit random 0", "edit reversed"}
    write_rows(tmp_path, "seen.jsonl", [row for row in rows if row["prompt"] not in expected])
    args[args.index(file)] = tmp_path / "seen.jsonl"
    refused(
        *args,
        "--output",
        tmp_path / "none",
        words=("no tasks, no demonstrations and no prompts", "no edit was fitted on"),
    )


def test_answers_to_prompts(edit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.txt").write_text("What is ice?\nWho bakes bread?\nWhy?\n")
    (tmp_path / "own_measure.py").write_text("def letters(prompt, answer):\n    return len(answer)\n")
    monkeypatch.chdir(tmp_path)
    args: list[object] = ["evaluate", "--edit", f"mild={edit_folder}", "--prompts", "prompts.txt", "--scorer", "tokens"]
    args += ["--scorer", "own_measure:letters", "--aim", "letters=higher", "--max-new-tokens", 5]
    args += ["--control-seeds", "0", "--output", tmp_path / "out"]
    text = " ".join(passed(*args).split())
    for metric in ("tokens", "letters", "repetition", "loss"):
        assert f"answers {metric}" in text
    assert "Rows without p have no aim" in text
    results = Results.load(tmp_path / "out")
    assert "answers letters" in run("compare", tmp_path / "out", tmp_path / "out").stdout
    task = results.tasks["answers"]
    assert task.questions == ["What is ice?", "Who bakes bread?", "Why?"]
    assert task.metrics["letters"].arms["mild"].numerators == [float(len(text)) for text in task.answers["mild"]]
    assert task.metrics["tokens"].arms["base"].numerators == [5.0] * 3
    rows = {row["metric"]: row for row in json.loads(passed(*args, "--json"))["edits"][0]["rows"]}
    assert (rows["letters"]["headline"], rows["tokens"]["headline"]) == (True, False)
    assert set(results.domain_damage) == {"mild", "mild random 0", "mild reversed"}


def test_a_classifier_and_a_judge_of_answers(
    model_folder: Path, edit_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    labels = {0: "gloomy", 1: "glad"}
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=40,
        id2label=labels,
        label2id={label: number for number, label in labels.items()},
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    args: list[object] = ["evaluate", "--edit", edit_folder, "--prompts", "bundled:formality", "--max-new-tokens", 3]
    args += ["--control-seeds", "", "--no-reversed", "--output", tmp_path / "out"]
    refused(*args, "--classifier", tmp_path / "classifier", words=("has the labels gloomy, glad; name one",))
    args += ["--classifier", f"mood={tmp_path / 'classifier'}:glad", "--judge", model_folder, "--criterion", "warmth"]
    text = " ".join(passed(*args).split())
    assert "answers mood" in text
    assert "over the base model's answer by warmth" in text
    task = Results.load(tmp_path / "out").tasks["answers"]
    assert all(0 < score < 1 for score in task.metrics["mood"].arms["base"].numerators if score is not None)
    assert task.metrics["judge_preference"].headline


def test_several_strengths_are_arms_of_their_own(edit_folder: Path, local: Path, tmp_path: Path) -> None:
    args: list[object] = ["evaluate", "--edit", f"mild={edit_folder}", "--tasks", "truthfulqa_mc1", "--data-dir", local]
    args += ["--limit", 3, "--control-seeds", "0", "--no-reversed"]
    passed(*args, "--strength", "0.5, 2", "--output", tmp_path / "out")
    results = Results.load(tmp_path / "out")
    assert list(results.arms) == ["base", "mild at 0.5", "mild at 0.5 random 0", "mild at 2", "mild at 2 random 0"]
    passed(*args, "--strength", "2", "--output", tmp_path / "one")
    alone = Results.load(tmp_path / "one")
    assert list(alone.arms) == ["base", "mild", "mild random 0"]
    assert alone.damage["mild"] == results.damage["mild at 2"]
    for text, words in (("a", "strength is 'a'"), (",", "--strength is ','")):
        refused(*args, "--strength", text, "--output", tmp_path / "none", words=(words,))


def test_prompts_as_the_harness_writes_them(edit_folder: Path, local: Path, tmp_path: Path) -> None:
    args: list[object] = ["evaluate", "--edit", f"mild={edit_folder}", "--tasks", "truthfulqa_mc1", "--data-dir", local]
    args += ["--limit", 3, "--control-seeds", "", "--no-reversed", "--output"]
    text = " ".join(passed(*args, tmp_path / "raw").split())
    assert "the edit 'mild' was fitted with the chat template, but these prompts are written without" in text
    data = json.loads(passed(*args, tmp_path / "raw", "--json"))
    assert "add --apply-chat-template" in data["notes"]["truthfulqa_mc1"][0]
    assert "add --apply-chat-template" in (tmp_path / "raw" / "report.html").read_text()
    text = passed(*args, tmp_path / "chat", "--apply-chat-template", "--system-instruction", "Be brief.")
    assert "was fitted" not in text
    settings = Results.load(tmp_path / "chat").settings
    assert (settings["apply_chat_template"], settings["system_instruction"]) == (True, "Be brief.")


def test_options_without_effect_are_refused(edit_folder: Path, local: Path, tmp_path: Path) -> None:
    args: list[object] = ["evaluate", "--edit", edit_folder, "--output", tmp_path / "out"]
    tasks: list[object] = ["--tasks", "truthfulqa_mc1", "--data-dir", local]
    prompts: list[object] = ["--prompts", "bundled:positivity"]
    for option, value in (("--scorer", "tokens"), ("--classifier", "x"), ("--aim", "loss=lower"), ("--criterion", "x")):
        refused(*args, *tasks, option, value, words=(f"{option} is for the answers to prompts", "give --prompts"))
    refused(*args, *tasks, "--max-new-tokens", 5, words=("--max-new-tokens is for the answers",))
    limited = ("--limit is 3, but it limits the items of --tasks", "--demonstrations-limit")
    refused(*args, *prompts, "--limit", 3, words=limited)
    refused("tune", "--demonstrations", "bundled:politeness", "--output", tmp_path / "out", "--limit", 3, words=limited)
    refused(*args, *prompts, "--num-fewshot", 2, words=("--num-fewshot is for the tasks", "leave it out"))
    refused(
        *args, *tasks, "--chat-template-arg", "a=1", words=("has no effect on raw prompts", "--apply-chat-template")
    )
    refused(*args, *prompts, "--aim", "loss=small", words=("--aim gives loss the value 'small'", "higher, lower"))
    refused(*args, *prompts, "--criterion", "warmth", words=("--criterion is for a judge", "--judge"))
    refused(*args, *prompts, "--scorer", "tokns", words=("unknown scorer 'tokns'", "did you mean 'tokens'"))
    refused(*args, "--prompts", tmp_path / "none.txt", words=("there is no file",))
