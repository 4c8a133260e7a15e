"""What an edit was fitted on is found in demonstrations and task items, and not scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import sealign
from sealign.demonstrations.demonstration import Demonstration
from sealign.errors import SettingError
from sealign.evaluation.evaluate_edits import evaluate
from sealign.evaluation.evaluation_config import EvaluationConfig
from sealign.evaluation.search import Search
from sealign.evaluation.tuning_config import TuneConfig
from sealign.evaluation.unseen import fitted_prompts, split_seen, unseen_items
from sealign.progress import no_progress
from tests.evaluation.planted import planted_demonstrations
from tests.evaluation_data import HARNESS_WARNINGS, write_truthfulqa

pytestmark = HARNESS_WARNINGS


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_truthfulqa(folder, count=16)
    return folder


@pytest.fixture(scope="module")
def questions(data: Path) -> list[Demonstration]:
    """The questions of the task as demonstrations, in its order."""
    return sealign.load_demonstrations("truthfulqa", data_dir=data)


def test_demonstrations(llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    # The same prompt with other completions counts as seen.
    leaked = Demonstration(demonstrations[1].prompt, "A baker.", "A clock by the river.")
    edit = sealign.fit_edit(llama, tokenizer, demonstrations[:4], config=sealign.MeanDifferenceConfig())
    fitted, rest = split_seen([*demonstrations, leaked], [edit])
    assert fitted == [*demonstrations, leaked]
    assert rest == demonstrations[4:]
    assert split_seen(demonstrations, [], fits=True) == (demonstrations, [])
    fitted, rest = split_seen(demonstrations, [], fits=True, holdout=0.3)
    assert len(fitted) == 5
    assert sorted(item.hash for item in fitted + rest) == sorted(item.hash for item in demonstrations)


def test_items_of_tasks(llama: Any, tokenizer: Any) -> None:
    fitted = [
        Demonstration("Is the sea salty?", "Yes.", "No."),
        Demonstration("Ann met Bo. Who was late?", "Bo.", "Ann."),
    ]
    edit = sealign.fit_edit(llama, tokenizer, fitted, config=sealign.MeanDifferenceConfig())
    items: list[dict[str, object]] = [
        {"question": "Is the sea salty?\n", "labels": [1, 0]},
        {"question": "Is the sea sweet?"},
        {"context": "Ann met Bo.", "question": "Who was late?", "label": 2},
        {"context": "Bo met Ann.", "question": "Who was late?"},
        {"text": None},
    ]
    assert unseen_items(items, fitted_prompts([edit])) == [1, 3, 4]
    assert unseen_items(items, fitted_prompts([])) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("limit", [None, 9])
def test_an_evaluation_leaves_items_out(
    limit: int | None, llama: Any, tokenizer: Any, data: Path, questions: list[Demonstration], tmp_path: Path
) -> None:
    first = sealign.fit_edit(llama, tokenizer, questions[2:5], config=sealign.MeanDifferenceConfig())
    second = sealign.fit_edit(llama, tokenizer, questions[4:11], config=sealign.MeanDifferenceConfig())
    config = EvaluationConfig(
        tasks=["truthfulqa_mc1"], data_dir=data, limit=limit, control_seeds=(), reversed_control=False
    )
    results = evaluate(llama, tokenizer, {"first": first, "second": second}, config=config, output=tmp_path)
    task = results.tasks["truthfulqa_mc1"]
    expected = [questions[number].prompt for number in [0, 1, *range(11, 16)]][: None if limit is None else 2]
    assert task.questions == expected
    count = 9 if limit is None else 7
    assert task.notes[0] == f"{count} of its items were left out, since an edit was fitted on their prompts"
    plain = evaluate(llama, tokenizer, {}, config=config, output=tmp_path / "base")
    assert len(plain.tasks["truthfulqa_mc1"].questions) == (limit or 16)
    assert not plain.tasks["truthfulqa_mc1"].notes


def test_a_task_of_which_nothing_is_left(
    llama: Any, tokenizer: Any, data: Path, questions: list[Demonstration], tmp_path: Path
) -> None:
    edit = sealign.fit_edit(llama, tokenizer, questions, config=sealign.MeanDifferenceConfig())
    config = EvaluationConfig(tasks=["truthfulqa_mc1"], data_dir=data)
    with pytest.raises(SettingError, match="fitted on all 16 items of task 'truthfulqa_mc1'; leave"):
        evaluate(llama, tokenizer, {"all": edit}, config=config, output=tmp_path)


def test_tuning_divides_items_as_demonstrations(
    llama: Any, tokenizer: Any, data: Path, questions: list[Demonstration], tmp_path: Path
) -> None:
    config = TuneConfig(tasks=["truthfulqa_mc1"], data_dir=data)
    # Some questions are no demonstrations, and some demonstrations are no questions.
    search = Search(
        llama, tokenizer, [*questions[:12], *planted_demonstrations(4)], config, tmp_path, track=no_progress
    )
    development, test = search.items["truthfulqa_mc1"]
    prompts = [item.prompt for item in questions]
    fitted, compared, tested = (
        {prompts.index(item.prompt) for item in part if item.prompt in prompts}
        for part in (search.fitted, search.development, search.tested)
    )
    assert fitted
    assert not fitted & {*development, *test}
    assert not set(development) & set(test)
    assert compared <= set(development)
    assert tested <= set(test)
    assert {*development, *test} | fitted == set(range(16))
