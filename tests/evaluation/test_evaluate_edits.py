"""Whole evaluations of a tiny model on local data: arms, resuming, and the scores of the harness itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval")

import sealign
from sealign.errors import FingerprintError, ResultsFileError, SettingError
from sealign.evaluation import evaluate_edits
from sealign.evaluation.comparison import report_edits
from sealign.evaluation.damage import measure_damage
from sealign.evaluation.evaluate_edits import evaluate
from sealign.evaluation.evaluation_config import EvaluationConfig
from sealign.evaluation.harness import SealignLM
from sealign.evaluation.judge import NOT_JUDGED
from sealign.evaluation.results import Results
from sealign.versions import library_versions
from tests.conftest import our_hooks
from tests.evaluation.test_scoring import forward_calls
from tests.evaluation_data import HARNESS_WARNINGS, write_controls, write_truthfulqa
from tests.tiny_models import build_model

pytestmark = [pytest.mark.slow, *HARNESS_WARNINGS]

TASKS = ["truthfulqa_mc1", "truthfulqa_mc2"]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_truthfulqa(folder)
    write_controls(folder)
    return folder


@pytest.fixture
def config(local: Path) -> EvaluationConfig:
    return EvaluationConfig(tasks=TASKS, data_dir=local, control_seeds=(0, 4), batch_size=3)


def _without_times(results: Results) -> Results:
    return dataclasses.replace(
        results, arms={name: dataclasses.replace(arm, seconds={}) for name, arm in results.arms.items()}
    )


def test_arms_scores_and_damage(
    llama: Any, tokenizer: Any, small_edit: sealign.Edit, config: EvaluationConfig, tmp_path: Path
) -> None:
    results = evaluate(llama, tokenizer, {"mild": small_edit}, config=config, output=tmp_path, command="as typed")
    assert results == Results.load(tmp_path)
    names = ["base", "mild", "mild random 0", "mild random 4", "mild reversed"]
    assert list(results.arms) == list(results.tasks["truthfulqa_mc1"].answers) == names
    assert results.arms["mild"].hash == small_edit.hash
    assert results.arms["mild random 4"].hash == small_edit.randomized(4).hash
    assert results.arms["mild reversed"].hash == small_edit.reversed().hash
    mild = results.arms["mild"]
    assert (mild.method, mild.strength, mild.layers) == ("sea", 0.7, [1, 3])
    assert mild.config == small_edit.record.config
    assert mild.fit_seconds == small_edit.fit_seconds
    assert results.model.fingerprint == small_edit.record.model.fingerprint
    assert results.command == "as typed"
    for task in TASKS:
        assert set(results.arms["mild"].seconds) == set(TASKS)
        assert len(results.tasks[task].questions) == 10
    assert set(results.damage) == set(names[1:])
    for name, arm in (("mild", small_edit), ("mild reversed", small_edit.reversed())):
        expected = measure_damage(llama, tokenizer, arm)
        assert results.damage[name].damage.loss_increase == pytest.approx(expected.loss_increase, abs=1e-6)
    assert our_hooks(llama) == 0


@pytest.mark.parametrize("normalization", ["token", "feature"])
def test_the_harness_itself_gives_the_same_scores(
    llama: Any,
    tokenizer: Any,
    small_edit: sealign.Edit,
    config: EvaluationConfig,
    local: Path,
    tmp_path: Path,
    normalization: Any,
) -> None:
    """Compare with the harness's own model with the edit attached, run by ``simple_evaluate``."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from sealign.evaluation.local_tasks import task_manager

    edit = small_edit.with_normalization(normalization)
    config = config.replace(control_seeds=(), reversed_control=False)
    results = evaluate(llama, tokenizer, {"mild": edit}, config=config, output=tmp_path)
    assert list(results.arms) == ["base", "mild"]
    metrics = {"truthfulqa_mc1": ("acc", "acc"), "truthfulqa_mc2": ("mc2", "acc")}
    with task_manager(TASKS, local) as manager, sealign.apply_edit(llama, edit):
        for task, (ours, theirs) in metrics.items():
            lm = HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=1)
            found = simple_evaluate(model=lm, tasks=[task], bootstrap_iters=0, task_manager=manager)
            value = found["results"][task][f"{theirs},none"]
            assert results.tasks[task].metrics[ours].value("mild") == pytest.approx(float(value), abs=1e-4)


def test_an_interrupted_run_continues(
    llama: Any,
    tokenizer: Any,
    small_edit: sealign.Edit,
    config: EvaluationConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = evaluate(llama, tokenizer, {"mild": small_edit}, config=config, output=tmp_path / "whole")
    scored, real = [0], SealignLM.loglikelihood

    class KilledError(Exception):
        pass

    def count(self: Any, requests: Any, **kwargs: Any) -> Any:
        scored[0] += 1
        if scored[0] == 6:
            raise KilledError
        return real(self, requests, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SealignLM, "loglikelihood", count)
        with pytest.raises(KilledError):
            evaluate(llama, tokenizer, {"mild": small_edit}, config=config, output=tmp_path / "part")
    assert not (tmp_path / "part" / "results.json").exists()
    assert our_hooks(llama) == 0
    passes = [0]

    def counted(*_: Any) -> None:
        passes[0] += 1

    handle = llama.register_forward_pre_hook(counted)
    try:
        resumed = evaluate(llama, tokenizer, {"mild": small_edit}, config=config, output=tmp_path / "part")
        after_kill, passes[0] = passes[0], 0
        again = evaluate(llama, tokenizer, {"mild": small_edit}, config=config, output=tmp_path / "part")
    finally:
        handle.remove()
    assert after_kill > 0
    assert passes[0] == 0  # a finished evaluation is read, not run
    assert _without_times(resumed) == _without_times(whole) == _without_times(again)


def test_scores_of_other_versions_are_not_continued(
    llama: Any, tokenizer: Any, config: EvaluationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.replace(tasks=["truthfulqa_mc1"])
    journal = tmp_path / "journal"
    evaluate(llama, tokenizer, {}, config=config, output=tmp_path / "old", journal=journal)
    before = {file.name for file in journal.iterdir()}
    versions = library_versions("lm_eval") | {"torch": "1.0"}
    monkeypatch.setattr(evaluate_edits, "library_versions", lambda *_: versions)
    with forward_calls(llama) as calls:
        evaluate(llama, tokenizer, {}, config=config, output=tmp_path / "new", journal=journal)
    assert calls
    assert before < {file.name for file in journal.iterdir()}


def test_an_edit_that_gives_nan_is_broken(
    llama: Any, tokenizer: Any, small_edit: sealign.Edit, demonstrations: Any, config: EvaluationConfig, tmp_path: Path
) -> None:
    config = config.replace(
        demonstrations=demonstrations, prompt_format=sealign.PromptFormat("plain"), control_seeds=()
    )
    # Some products are infinite in float32; a strength that a user gives has bounds.
    beyond = dataclasses.replace(small_edit, record=dataclasses.replace(small_edit.record, strength=3.4e38))
    results = evaluate(llama, tokenizer, {"mad": beyond}, config=config, output=tmp_path)
    data = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert data["tasks"]["truthfulqa_mc1"]["metrics"]["acc"]["arms"]["mad"]["numerators"] == [None] * 10
    for file in (tmp_path / "journal").iterdir():
        for line in file.read_text().splitlines():
            json.loads(line, parse_constant=pytest.fail)
    (report,) = report_edits(Results.load(tmp_path))
    assert report.verdict.word == "broken"
    names = ["truthfulqa_mc1 acc", "truthfulqa_mc2 mc2", "truthfulqa_mc2 mc3", "preference preference_margin"]
    assert all(name in report.verdict.sentence for name in [*names, "the loss on neutral text"])
    assert {row.missing for row in report.headlines if row.task != "preference"} == {"not finite in 10 items"}
    again = evaluate(llama, tokenizer, {"mad": beyond}, config=config, output=tmp_path)
    assert again.tasks == results.tasks


def test_an_edit_of_another_model_is_accepted_to_the_last_step(
    tokenizer: Any, small_edit: sealign.Edit, demonstrations: Any, config: EvaluationConfig, tmp_path: Path
) -> None:
    wider = build_model("llama", vocab_size=len(tokenizer), intermediate_size=96)
    config = config.replace(demonstrations=demonstrations, prompt_format=sealign.PromptFormat("plain"))
    with pytest.raises(FingerprintError):
        evaluate(wider, tokenizer, {"mild": small_edit}, config=config, output=tmp_path / "a")
    results = evaluate(
        wider, tokenizer, {"mild": small_edit}, config=config, output=tmp_path / "b", ignore_mismatch=True
    )
    assert {"mild", "mild random 0", "mild reversed"} <= set(results.damage) & set(results.domain_damage)


def test_other_settings_do_not_replace_results(
    llama: Any, tokenizer: Any, small_edit: sealign.Edit, config: EvaluationConfig, tmp_path: Path
) -> None:
    config = config.replace(tasks=["truthfulqa_mc1"], control_seeds=(), reversed_control=False)
    evaluate(llama, tokenizer, {"mild": small_edit}, config=config, output=tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    stronger = small_edit.with_strength(0.9)
    for edits, other in (({"mild": stronger}, config), ({"mild": small_edit}, config.replace(limit=4))):
        with pytest.raises(
            ResultsFileError,
            match="with other edits or settings, which are replaced only with --overwrite",
        ):
            evaluate(llama, tokenizer, edits, config=other, output=tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before
    found = evaluate(llama, tokenizer, {"mild": stronger}, config=config, output=tmp_path, overwrite=True)
    assert found.arms["mild"].hash == stronger.hash
    assert (tmp_path / "results.json").read_bytes() != before


def test_the_base_model_alone_and_chosen_items(llama: Any, tokenizer: Any, local: Path, tmp_path: Path) -> None:
    config = EvaluationConfig(tasks=["truthfulqa_mc2"], data_dir=local, items={"truthfulqa_mc2": [7, 2, 5]})
    results = evaluate(llama, tokenizer, {}, config=config, output=tmp_path / "some")
    everything = EvaluationConfig(tasks=["truthfulqa_mc2"], data_dir=local)
    full = evaluate(llama, tokenizer, {}, config=everything, output=tmp_path / "all")
    task, whole = results.tasks["truthfulqa_mc2"], full.tasks["truthfulqa_mc2"]
    assert sorted(task.questions) == sorted(whole.questions[i] for i in (2, 5, 7))
    for question, score in zip(task.questions, task.metrics["mc2"].arms["base"].numerators, strict=True):
        expected = whole.metrics["mc2"].arms["base"].numerators[whole.questions.index(question)]
        assert score == pytest.approx(expected, abs=1e-5)
    assert results.damage == {}


@pytest.fixture
def roomy(tokenizer: Any) -> Any:
    """A tiny model whose context has room for a few-shot prompt and its answer."""
    return build_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)


def test_control_tasks_and_generation(
    roomy: Any, tokenizer: Any, demonstrations: Any, local: Path, tmp_path: Path
) -> None:
    edit = sealign.fit_edit(roomy, tokenizer, demonstrations, config=sealign.SEAConfig(rank=2, layers=(1,)))
    config = EvaluationConfig(
        tasks=["hellaswag", "mathqa", "toxigen", "truthfulqa_gen"],
        data_dir=local,
        limit=3,
        control_seeds=(),
        reversed_control=False,
    )
    results = evaluate(roomy, tokenizer, {"mild": edit}, config=config, output=tmp_path)
    for task in ("hellaswag", "mathqa", "toxigen"):
        metrics = results.tasks[task].metrics
        assert [name for name, metric in metrics.items() if metric.headline] == ["acc"]
        assert {"acc", "acc_norm"} <= set(metrics)
    generated = results.tasks["truthfulqa_gen"]
    assert generated.notes[0] == NOT_JUDGED
    assert any(generated.answers["base"])
    assert "bleu_acc" in generated.metrics


def test_preamble_length_of_answers_and_a_shared_journal(
    roomy: Any, tokenizer: Any, local: Path, tmp_path: Path
) -> None:
    tasks = ["truthfulqa_gen", "truthfulqa_mc2"]
    own = EvaluationConfig(tasks=tasks, data_dir=local, limit=3, max_new_tokens={"truthfulqa_gen": 3})
    plain = evaluate(roomy, tokenizer, {}, config=own, output=tmp_path / "plain", journal=tmp_path / "journal")
    longer = own.replace(max_new_tokens={"truthfulqa_gen": 30})
    more = evaluate(roomy, tokenizer, {}, config=longer, output=tmp_path / "longer", journal=tmp_path / "journal")
    answers = [found.tasks["truthfulqa_gen"].answers["base"] for found in (plain, more)]
    assert all(len(few) < len(many) for few, many in zip(*answers, strict=True))
    assert not (tmp_path / "plain" / "journal").exists()
    lines = sum(len(file.read_text().splitlines()) for file in (tmp_path / "journal").glob("*.jsonl"))
    again = evaluate(roomy, tokenizer, {}, config=own, output=tmp_path / "again", journal=tmp_path / "journal")
    assert again.tasks == plain.tasks
    assert sum(len(file.read_text().splitlines()) for file in (tmp_path / "journal").glob("*.jsonl")) == lines
    asked = own.replace(preamble="Q: What do bees make?\nA: Honey.\n\n")
    other = evaluate(roomy, tokenizer, {}, config=asked, output=tmp_path / "asked", journal=tmp_path / "journal")
    values = [found.tasks["truthfulqa_mc2"].metrics["mc2"].value("base") for found in (plain, other)]
    assert values[0] != values[1]


def test_judged_generation(roomy: Any, tokenizer: Any, local: Path, tmp_path: Path) -> None:
    class Length:
        name = "length"

        def decide(self, questions: Any, track: Any) -> list[bool]:
            return [len(question) % 2 == 0 for question in questions]

    config = EvaluationConfig(tasks=["truthfulqa_gen"], data_dir=local, limit=4, judge=Length())
    task = evaluate(roomy, tokenizer, {}, config=config, output=tmp_path).tasks["truthfulqa_gen"]
    headlines = [name for name, metric in task.metrics.items() if metric.headline]
    assert headlines == ["truth", "info", "truth*info"]
    truth, info, both = (np.array(task.metrics[name].arms["base"].numerators) for name in headlines)
    assert (truth * info == both).all()
    assert set(truth) | set(info) <= {0.0, 1.0}
    assert task.notes == []
    assert Results.load(tmp_path).settings["judge"] == "length"


def test_refusals(llama: Any, tokenizer: Any, small_edit: sealign.Edit, local: Path, tmp_path: Path) -> None:
    config = EvaluationConfig(tasks=["truthfulqa_mc1"], data_dir=local)
    with pytest.raises(SettingError, match="an edit is named 'base', which is the name of another arm"):
        evaluate(llama, tokenizer, {"base": small_edit}, config=config, output=tmp_path / "x")
    missing = EvaluationConfig(tasks=["bbq"], data_dir=local)
    with pytest.raises(SettingError, match="task 'bbq' needs the file"):
        evaluate(llama, tokenizer, {}, config=missing, output=tmp_path / "y")
