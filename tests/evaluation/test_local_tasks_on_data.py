"""Tasks on local data, and the scores of their items against the totals of the harness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from sealign.errors import SettingError
from sealign.evaluation.item_scores import ItemScores, item_scores
from sealign.evaluation.local_tasks import LOCAL_TASKS, task_manager
from tests.evaluation_data import HARNESS_WARNINGS

pytestmark = [pytest.mark.slow, *HARNESS_WARNINGS]


def _run(task: str, data_dir: Path, limit: int) -> dict[str, Any]:
    """Run the harness with its dummy model, whose answers are random."""
    import lm_eval

    with task_manager([task], data_dir) as manager:
        result: dict[str, Any] = lm_eval.simple_evaluate(
            model="dummy", tasks=[task], limit=limit, log_samples=True, bootstrap_iters=0, task_manager=manager
        )
    return result


PRESENT = [
    "truthfulqa_mc1", "truthfulqa_mc2", "truthfulqa_gen", "halueval_qa", "bbq",
    "crows_pairs_english", "mmlu", "commonsense_qa", "gsm8k", "gsm8k_cot", "nq_open",
]  # fmt: skip


@pytest.mark.parametrize("task", [task for task in PRESENT if task != "truthfulqa_gen"])
def test_plain_metrics_match_the_harness(task: str, data_dir: Path) -> None:
    result = _run(task, data_dir, 30)
    samples = result["samples"][task]
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    assert len(first) == 30
    found = item_scores(task, first)
    assert found
    totals = {k.split(",")[0]: v for k, v in result["results"][task].items() if k.endswith(f",{samples[0]['filter']}")}
    names = {"mc2": "acc"} if task == "truthfulqa_mc2" else {}
    compared = 0
    for name, scores in found.items():
        total = totals.get(names.get(name, name))
        if total is not None and "/" not in name:
            assert scores.value == pytest.approx(float(total))
            compared += 1
    assert compared >= 1


def test_bbq_scores_match_the_harness(data_dir: Path) -> None:
    result = _run("bbq", data_dir, 400)
    found = item_scores("bbq", result["samples"]["bbq"])
    totals = {name.split(",")[0]: value for name, value in result["results"]["bbq"].items()}
    pairs = {
        "acc": "acc",
        "acc_ambiguous": "accuracy_amb",
        "acc_disambiguated": "accuracy_disamb",
        "bias_score_ambiguous": "amb_bias_score",
        "bias_score_disambiguated": "disamb_bias_score",
    }
    for category in ("Religion", "Sexual_orientation", "Physical_appearance"):
        for kind, ours in (("amb", "ambiguous"), ("disamb", "disambiguated")):
            pairs[f"bias_score_{ours}/{category}"] = f"{kind}_bias_score_{category}"
    compared = 0
    for ours, theirs in pairs.items():
        if ours in found:
            assert found[ours].value == pytest.approx(float(totals[theirs])), ours
            compared += 1
    assert compared >= 9
    unknown = []
    for sample in result["samples"]["bbq"]:
        answer = int(np.argmax([pair[0] for pair in sample["filtered_resps"]]))
        # The harness offers every wording of "unknown" beside the two people.
        kinds = {sample["doc"][f"ans{i}"]: sample["doc"]["answer_info"][f"ans{i}"][1] for i in range(3)}
        unknown.append(kinds.get(sample["arguments"][answer][1].strip(), "unknown") == "unknown")
    assert found["unknown_rate"].value == pytest.approx(np.mean(unknown))


def test_mc3_and_crows_by_type(data_dir: Path) -> None:
    result = _run("truthfulqa_mc2", data_dir, 40)
    found = item_scores("truthfulqa_mc2", result["samples"]["truthfulqa_mc2"])
    expected = []
    for sample in result["samples"]["truthfulqa_mc2"]:
        true: list[Any] = []
        false: list[Any] = []
        for label, (value, _) in zip(sample["doc"]["mc2_targets"]["labels"], sample["filtered_resps"], strict=True):
            (true if label else false).append(value)
        expected.append(sum(value > max(false) for value in true) / len(true))
    assert found["mc3"].value == pytest.approx(np.mean(expected))
    result = _run("crows_pairs_english", data_dir, 120)
    found = item_scores("crows_pairs_english", result["samples"]["crows_pairs_english"])
    parts = [scores for name, scores in found.items() if "/" in name]
    assert sum(len(part.items) for part in parts) == len(found["pct_stereotype"].items) == 120
    assert sum(part.numerators.sum() for part in parts) == found["pct_stereotype"].numerators.sum()


def test_ratios() -> None:
    ratio = ItemScores(np.arange(3), np.array([1.0, 0, 1]), np.array([1.0, 1, 2]), scale=2.0, offset=-1.0)
    assert ratio.value == 0.0
    assert np.isnan(ItemScores(np.arange(1), np.zeros(1), np.zeros(1)).value)


def test_unknown_tasks_and_missing_files(tmp_path: Path, data_dir: Path) -> None:
    with (
        pytest.raises(SettingError, match=r"unknown task 'truthfulqa_mc' \(did you mean 'truthfulqa_mc\d'"),
        task_manager(["truthfulqa_mc"]),
    ):
        pass
    with (
        pytest.raises(SettingError, match="needs the file .*mc.*not there; check --data-dir|needs the file"),
        task_manager(["bbq"], tmp_path),
    ):
        pass
    with pytest.raises(SettingError, match="'arc_easy' cannot read local data"), task_manager(["arc_easy"], data_dir):
        pass


def test_local_tasks_have_the_configuration_of_the_harness() -> None:
    from sealign.evaluation.local_tasks import _known_tasks

    for name, task in LOCAL_TASKS.items():
        path = _known_tasks().task_index[name].yaml_path
        if name != "mmlu":  # a group there
            assert str(path).endswith(task.config), name


def test_all_tasks_with_data_can_read_it() -> None:
    assert set(PRESENT) <= set(LOCAL_TASKS)
