"""Questions, answers, groups and scores from samples of the harness."""

from __future__ import annotations

from typing import Any

import pytest

from sealign.evaluation.samples import TaskSamples


def _choice(doc_id: int, logs: list[float], doc: dict[str, Any], **metrics: float) -> dict[str, Any]:
    return {
        "doc_id": doc_id,
        "doc": doc,
        "arguments": [(f"Q: example\nA: x\n\nQ: item {doc_id}\nA:", f" choice {n}") for n in range(len(logs))],
        "resps": [[(log, False)] for log in logs],
        "filtered_resps": [(log, False) for log in logs],
        "filter": "none",
        "metrics": list(metrics),
        **metrics,
    }


def _found(samples: dict[str, list[dict[str, Any]]], **higher: bool) -> dict[str, Any]:
    names = list(samples)
    return {
        "samples": samples,
        "versions": dict.fromkeys(names, 1.5),
        "higher_is_better": {name: higher or {"acc": True} for name in names},
    }


def test_choices() -> None:
    samples = [
        _choice(3, [-2.0, -1.0, -3.0], {"question": "Who?", "context": "Once."}, acc=1.0),
        _choice(1, [-1.0, -2.0], {"other": 5}, acc=0.0),
    ]
    found = TaskSamples.of("some_task", _found({"some_task": samples}))
    assert found.version == "1.5"
    assert found.questions == ["Q: item 1\nA:", "Once. Who?"]  # in the order of the items
    assert found.answers == ["choice 0", "choice 1"]
    assert found.groups is None
    assert found.scores()["acc"].numerators.tolist() == [0.0, 1.0]
    assert found.scores()["acc"].items.tolist() == [0, 1]
    assert found.scores()["acc"].aim == "higher"


def test_metrics_that_are_better_lower() -> None:
    samples = [_choice(n, [-1.0], {}, word_perplexity=3.0 + n) for n in range(2)]
    found = TaskSamples.of("wiki", _found({"wiki": samples}, word_perplexity=False))
    assert found.scores()["word_perplexity"].aim == "lower"


def test_generations_and_the_last_filter() -> None:
    samples = []
    for name, score in (("strict-match", 0.0), ("flexible-extract", 1.0)):
        for n in (1, 0):
            doc = {"question": f"What is {n} + {n}?"}
            sample = _choice(n, [], doc, exact_match=score) | {"filter": name}
            sample |= {"arguments": [("prompt", {"until": ["."]})], "resps": [[f" {2 * n} "]]}
            samples.append(sample)
    found = TaskSamples.of("gsm8k", _found({"gsm8k": samples}, exact_match=True))
    assert found.questions == ["What is 0 + 0?", "What is 1 + 1?"]
    assert found.answers == ["0", "2"]
    assert found.scores()["exact_match"].value == 1.0


def test_items_of_a_group_of_tasks_are_numbered_over_all_tasks() -> None:
    parts = {
        "mmlu_law": [_choice(n, [-1.0, -2.0], {"question": f"law {n}"}, acc=float(n == 0)) for n in range(3)],
        "mmlu_art": [_choice(n, [-1.0, -2.0], {"question": f"art {n}"}, acc=1.0) for n in range(2)],
    }
    found = TaskSamples.of("mmlu", _found(parts))
    assert found.questions == ["law 0", "law 1", "law 2", "art 0", "art 1"]
    scores = found.scores()
    assert scores["acc"].items.tolist() == [0, 1, 2, 3, 4]
    assert scores["acc"].value == pytest.approx(3 / 5)
    assert scores["acc/law"].value == pytest.approx(1 / 3)
    assert scores["acc/art"].items.tolist() == [3, 4]


def test_bbq_items_of_one_template_are_a_group() -> None:
    docs = [{"category": "Age", "question_index": "4"}, {"category": "Age", "question_index": "5"}]
    samples = [_choice(n, [-1.0, -2.0], doc, acc=1.0) for n, doc in enumerate(docs)]
    assert TaskSamples.of("bbq", _found({"bbq": samples})).groups == ["Age 4", "Age 5"]
