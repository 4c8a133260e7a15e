"""Whole evaluations of answers to prompts: what each arm answers, how answers are scored, and what verdicts see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

import sealign
from sealign.demonstrations import Prompt, Turn
from sealign.errors import MeasureError, SettingError
from sealign.evaluation.answer_measures import ArmAnswer, Scorer, load_scorer
from sealign.evaluation.answers import compare_answers
from sealign.evaluation.comparison import report_edits
from sealign.evaluation.damage import measure_passages
from sealign.evaluation.evaluate_edits import evaluate
from sealign.evaluation.evaluation_config import EvaluationConfig
from sealign.evaluation.harness import SealignLM
from sealign.evaluation.results import Results
from sealign.models.passages import Passage
from sealign.models.prompt_format import PromptFormat
from tests.evaluation.test_judged_pairs import Longer
from tests.evaluation.test_scoring import forward_calls
from tests.evaluation_data import HARNESS_WARNINGS
from tests.tiny_models import build_model

pytestmark = HARNESS_WARNINGS

TEXTS = ["What is ice?", "Who bakes bread in the town by the river?", "Why?", "Where do fish live?"]
PLAIN = PromptFormat("plain")
LENGTH = 9


@pytest.fixture
def config() -> EvaluationConfig:
    return EvaluationConfig(
        prompts=[Prompt(text) for text in TEXTS],
        prompt_format=PLAIN,
        max_new_tokens={"answers": LENGTH},
        control_seeds=(4,),
        batch_size=3,
    )


def _run(model: Any, tokenizer: Any, edits: Any, config: EvaluationConfig, folder: Path) -> Results:
    return evaluate(model, tokenizer, edits, config=config, output=folder)


def test_every_arm_answers_and_every_answer_is_scored(
    llama: Any, tokenizer: Any, small_edit: sealign.Edit, config: EvaluationConfig, tmp_path: Path
) -> None:
    config = config.replace(measures=[load_scorer("tokens"), load_scorer("distinct-2")], aims={"distinct-2": "lower"})
    results = _run(llama, tokenizer, {"mild": small_edit}, config, tmp_path)
    assert results == Results.load(tmp_path)
    task = results.tasks["answers"]
    assert task.questions == TEXTS
    arms = {"mild": small_edit, "mild random 4": small_edit.randomized(4), "mild reversed": small_edit.reversed()}
    assert list(task.answers) == ["base", *arms]
    for name, edit in arms.items():
        found = compare_answers(llama, tokenizer, edit, TEXTS, prompt_format=PLAIN, max_new_tokens=LENGTH)
        assert task.answers["base"] == [answer.base for answer in found]
        assert task.answers[name] == [answer.edited for answer in found]
    assert {name: (metric.aim, metric.headline) for name, metric in task.metrics.items()} == {
        "tokens": (None, False),
        "distinct-2": ("lower", True),
        "repetition": (None, False),
        "loss": (None, False),
    }
    (report,) = report_edits(results)
    assert [row.metric for row in report.headlines] == ["distinct-2"]
    assert [row.metric for row in report.shown] == ["distinct-2", "tokens", "repetition", "loss"]
    assert all(row.difference is not None and row.random is not None for row in report.shown)


def test_the_loss_is_that_of_the_base_model_with_the_end_token(
    tokenizer: Any, demonstrations: Any, config: EvaluationConfig, tmp_path: Path
) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=sealign.SEAConfig(rank=2, layers=(1,)))
    prompt = PLAIN.encode_prompt(tokenizer, TEXTS[0])
    ids = torch.tensor([prompt])
    free = model.generate(ids, max_new_tokens=LENGTH, do_sample=False)[0, len(prompt) :].tolist()
    end = next(token for token in free[1:] if token != free[0])
    model.generation_config.eos_token_id = end
    expected = {}
    with torch.no_grad():
        for arm, intervention in (("base", None), ("mild", edit)):
            if intervention is None:
                new = model.generate(ids, max_new_tokens=LENGTH, do_sample=False)[0, len(prompt) :].tolist()
            else:
                with sealign.apply_edit(model, intervention):
                    new = model.generate(ids, max_new_tokens=LENGTH, do_sample=False)[0, len(prompt) :].tolist()
            logs = torch.log_softmax(model(torch.tensor([prompt + new])).logits[0].double(), -1)
            places = range(len(prompt) - 1, len(prompt) + len(new) - 1)
            expected[arm] = -float(np.mean([logs[place, token] for place, token in zip(places, new, strict=True)]))
            ended = new[-1] == end
            assert ended or arm == "mild"
    results = _run(model, tokenizer, {"mild": edit}, config, tmp_path)
    metric = results.tasks["answers"].metrics["loss"]
    for arm, loss in expected.items():
        assert metric.arms[arm].numerators[0] == pytest.approx(loss, abs=1e-4)


def test_damage_is_measured_on_the_base_models_answers(
    llama: Any, tokenizer: Any, small_edit: sealign.Edit, config: EvaluationConfig, tmp_path: Path
) -> None:
    results = _run(llama, tokenizer, {"mild": small_edit}, config, tmp_path)
    passages = []
    for text in TEXTS:
        prompt = PLAIN.encode_prompt(tokenizer, text)
        output = llama.generate(torch.tensor([prompt]), max_new_tokens=LENGTH, do_sample=False)
        passages.append(Passage(tuple(output[0].tolist()), len(prompt)))
    (expected,) = measure_passages(llama, tokenizer, [small_edit], passages)
    found = results.domain_damage["mild"].damage
    assert found.tokens.tolist() == [LENGTH] * len(TEXTS)
    assert found.divergence == pytest.approx(expected.divergence, abs=1e-5)


def test_a_prompt_of_a_demonstration_counts_once_in_the_damage(
    llama: Any, tokenizer: Any, small_edit: sealign.Edit, demonstrations: Any, config: EvaluationConfig, tmp_path: Path
) -> None:
    config = config.replace(demonstrations=demonstrations)  # two of the prompts are theirs
    results = _run(llama, tokenizer, {"mild": small_edit}, config, tmp_path)
    shared = {item.prompt for item in demonstrations} & set(TEXTS)
    assert len(shared) == 3
    assert len(results.domain_damage["mild"].tokens) == len(demonstrations) + len(TEXTS) - len(shared)


def test_prompts_that_an_edit_was_fitted_on_are_noted(
    llama: Any, tokenizer: Any, small_edit: sealign.Edit, demonstrations: Any, config: EvaluationConfig, tmp_path: Path
) -> None:
    config = config.replace(control_seeds=(), reversed_control=False)
    shared = {item.prompt for item in demonstrations} & set(TEXTS)
    for folder, prompts, count in (("own", TEXTS, len(shared)), ("new", ["How?", "When?"], 0)):
        asked = config.replace(prompts=[Prompt(text) for text in prompts], system_instruction="Be brief.")
        notes = _run(llama, tokenizer, {"mild": small_edit}, asked, tmp_path / folder).tasks["answers"].notes
        found = [note for note in notes if "an edit was fitted on" in note]
        assert [note.split()[5] for note in found] == [str(count)] * bool(count)


def test_history_system_instruction_and_repeated_prompts(
    llama: Any, tokenizer: Any, config: EvaluationConfig, tmp_path: Path
) -> None:
    brief = (Turn("system", "Be brief."),)
    config = config.replace(prompts=[Prompt("Why?"), Prompt("Why?", brief), Prompt("Why?")])
    task = _run(llama, tokenizer, {}, config, tmp_path / "a").tasks["answers"]
    assert task.questions == ["Why?", "Be brief.\n\nWhy?", "Why?"]
    assert task.groups is not None
    assert task.groups[0] == task.groups[2] != task.groups[1]
    told = _run(
        llama,
        tokenizer,
        {},
        config.replace(prompts=[Prompt("Why?"), Prompt("How?")], system_instruction="Be brief."),
        tmp_path / "b",
    ).tasks["answers"]
    assert told.questions[0] == "Be brief.\n\nWhy?"
    assert told.answers["base"][0] == task.answers["base"][1] != task.answers["base"][0]


def test_an_interrupted_run_continues_and_a_finished_one_is_read(
    llama: Any,
    tokenizer: Any,
    small_edit: sealign.Edit,
    config: EvaluationConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scored: list[ArmAnswer] = []

    def length(answer: ArmAnswer) -> int:
        scored.append(answer)
        return len(answer.text)

    config = config.replace(measures=[Scorer("length", length, "1")])
    whole = _run(llama, tokenizer, {"mild": small_edit}, config, tmp_path / "whole")
    all_scored = len(scored)
    real, calls = SealignLM.answer, [0]

    class KilledError(Exception):
        pass

    def killed(self: Any, prompts: Any, longest: int) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KilledError
        return real(self, prompts, longest)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(SealignLM, "answer", killed)
        _run(llama, tokenizer, {"mild": small_edit}, config, tmp_path / "part")
    resumed = _run(llama, tokenizer, {"mild": small_edit}, config, tmp_path / "part")
    assert resumed.tasks == whole.tasks
    scored.clear()
    with forward_calls(llama) as forward:
        again = _run(llama, tokenizer, {"mild": small_edit}, config, tmp_path / "part")
    assert again.tasks == whole.tasks
    assert (len(forward), len(scored)) == (0, 0)
    # Equal answers to one prompt are scored once.
    pairs = {
        (text, answer)
        for of_arm in whole.tasks["answers"].answers.values()
        for text, answer in zip(TEXTS, of_arm, strict=True)
    }
    assert all_scored == len(pairs)


def test_a_scorer_that_fails_stops_the_evaluation_with_prompt_and_arm(
    llama: Any, tokenizer: Any, small_edit: sealign.Edit, config: EvaluationConfig, tmp_path: Path
) -> None:
    def odd(answer: ArmAnswer) -> float:
        return float("nan") if answer.arm == "mild reversed" else 1.0

    config = config.replace(measures=[Scorer("odd", odd, "1")])
    with pytest.raises(MeasureError, match="scorer 'odd', for the answer of 'mild reversed' to 'What is ice"):
        _run(llama, tokenizer, {"mild": small_edit}, config, tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_a_judge_compares_and_its_preference_has_a_direction(
    llama: Any, tokenizer: Any, small_edit: sealign.Edit, config: EvaluationConfig, tmp_path: Path
) -> None:
    config = config.replace(judge=Longer(), criterion="length")
    results = _run(llama, tokenizer, {"mild": small_edit}, config, tmp_path)
    task = results.tasks["answers"]
    metric = task.metrics["judge_preference"]
    assert (metric.aim, metric.headline) == ("higher", True)
    assert metric.arms["base"].numerators == [0.5] * len(TEXTS)
    for arm in ("mild", "mild reversed"):
        lengths = [(len(one), len(two)) for one, two in zip(task.answers[arm], task.answers["base"], strict=True)]
        assert metric.arms[arm].numerators == [0.5 + np.sign(one - two) / 2 for one, two in lengths]
    assert "the preference of longer over the base model's answer by length; in 0 of" in task.notes[0]


def test_verdicts_depend_on_measures_with_an_aim_alone(
    llama: Any, tokenizer: Any, small_edit: sealign.Edit, config: EvaluationConfig, tmp_path: Path
) -> None:
    def planted(answer: ArmAnswer) -> float:
        """A known effect: one more for the edit, and something of the prompt in all arms."""
        return float(answer.arm == "mild") + len(answer.prompt.text) / 100

    prompts = [Prompt(f"What is number {number}?") for number in range(24)]
    config = config.replace(prompts=prompts, measures=[Scorer("planted", planted, "1")])
    words = {}
    for aim in ("higher", "lower", None):
        aims = {} if aim is None else {"planted": aim}
        results = evaluate(
            llama,
            tokenizer,
            {"mild": small_edit},
            config=config.replace(aims=aims),
            output=tmp_path / str(aim),
            journal=tmp_path / "journal",
        )
        (report,) = report_edits(results, max_damage=1e9)
        words[aim] = report.verdict.word
        row = next(row for row in report.shown if row.metric == "planted")
        assert row.difference is not None
        assert row.difference.difference > 0.3  # equal answers have one score
    assert words == {"higher": "helps", "lower": "harms", None: "no evidence"}


def test_prompts_and_answers_fit_into_the_context(
    llama: Any, tokenizer: Any, config: EvaluationConfig, tmp_path: Path
) -> None:
    config = config.replace(prompts=[Prompt("Why?"), Prompt("ice " * 300)])
    with pytest.raises(SettingError, match=r"prompt 2 of 2 is \d+ tokens long, but the context of the model is 256"):
        _run(llama, tokenizer, {}, config, tmp_path)


@pytest.mark.parametrize("normalization", ["feature"])
def test_an_edit_that_is_not_causal_answers_one_prompt_at_a_time(
    llama: Any, tokenizer: Any, small_edit: sealign.Edit, config: EvaluationConfig, tmp_path: Path, normalization: Any
) -> None:
    edit = small_edit.with_normalization(normalization)
    config = config.replace(control_seeds=(), reversed_control=False)
    task = _run(llama, tokenizer, {"mild": edit}, config, tmp_path).tasks["answers"]
    found = compare_answers(llama, tokenizer, edit, TEXTS, prompt_format=PLAIN, max_new_tokens=LENGTH)
    assert task.answers["mild"] == [answer.edited for answer in found]


def test_examples_before_prompts_belong_to_the_arm(
    tokenizer: Any, demonstrations: Any, config: EvaluationConfig, tmp_path: Path
) -> None:
    model = build_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)
    icl = sealign.fit_edit(model, tokenizer, demonstrations, config=sealign.ICLConfig())
    task = _run(model, tokenizer, {"icl": icl}, config, tmp_path).tasks["answers"]
    found = compare_answers(model, tokenizer, icl, TEXTS, prompt_format=PLAIN, max_new_tokens=LENGTH)
    assert task.answers["icl"] == [answer.edited for answer in found]
    assert task.answers["base"] == [answer.base for answer in found]
