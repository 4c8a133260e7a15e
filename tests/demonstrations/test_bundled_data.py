"""The bundled texts: written for this project, balanced, and apart from the benchmarks."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from sealign.evaluation.multiple_choice import bundled_questions
from sealign.models.prompt_format import default_preamble

DATA = files("sealign.demonstrations") / "data"
Row = dict[str, Any]


def read(name: str) -> list[Row]:
    text = (DATA / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def normal(text: str) -> str:
    """A text without case, punctuation and spacing."""
    return " ".join(words(text))


TRUTHFULNESS, FAIRNESS, QUESTIONS = read("truthfulness"), read("fairness"), read("multiple_choice")
DEMONSTRATIONS = {"truthfulness": TRUTHFULNESS, "fairness": FAIRNESS}


def preamble_questions() -> list[str]:
    return re.findall(r"^Q: (.*)$", default_preamble(), re.MULTILINE)


@pytest.mark.parametrize(("name", "at_least"), [("truthfulness", 120), ("fairness", 60), ("multiple_choice", 60)])
def test_files_are_clean_json_lines(name: str, at_least: int) -> None:
    data = (DATA / f"{name}.jsonl").read_bytes()
    assert data.endswith(b"}\n")
    assert b"\r" not in data
    assert b"\n\n" not in data
    assert data.count(b"\n") >= at_least
    rows = read(name)
    assert len(rows) == data.count(b"\n")
    keys = {"question", "best_answer", "correct_answers", "incorrect_answers", "topic"}
    keys = keys if name == "multiple_choice" else {"prompt", "positive", "negative", "topic"}
    for row in rows:
        assert set(row) == keys
        for value in row.values():
            for text in value if isinstance(value, list) else [value]:
                assert isinstance(text, str)
                assert text == text.strip() != ""
                assert text.isprintable()


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_demonstrations_are_distinct(name: str) -> None:
    rows = DEMONSTRATIONS[name]
    for key in ("prompt", "positive", "negative"):
        counts = Counter(normal(row[key]) for row in rows)
        repeated = [text for text, count in counts.items() if count > 1]
        assert not repeated, f"{key} repeated: {repeated}"
    for row in rows:
        assert normal(row["positive"]) != normal(row["negative"])


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_length_does_not_tell_positive_from_negative(name: str) -> None:
    rows = DEMONSTRATIONS[name]
    lengths = [(len(row["positive"]), len(row["negative"])) for row in rows]
    means = mean(positive for positive, _ in lengths), mean(negative for _, negative in lengths)
    assert abs(means[0] / means[1] - 1) < 0.05
    for row, (positive, negative) in zip(rows, lengths, strict=True):
        assert 2 / 3 < positive / negative < 3 / 2, row
    longer = sum(positive > negative for positive, negative in lengths)
    shorter = sum(positive < negative for positive, negative in lengths)
    assert max(longer, shorter) / len(rows) < 0.65


def test_no_short_answer_tells_truth_from_falsehood() -> None:
    for opening in ("yes", "no"):
        counts = [sum(words(row[key])[0] == opening for row in TRUTHFULNESS) for key in ("positive", "negative")]
        assert min(counts) >= 10
        assert max(counts) / min(counts) < 1.5


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_demonstrations_cover_many_topics_evenly(name: str) -> None:
    counts = Counter(row["topic"] for row in DEMONSTRATIONS[name])
    assert len(counts) >= 8
    assert max(counts.values()) - min(counts.values()) <= 1


def test_fairness_has_clear_and_unclear_stories() -> None:
    unknown = re.compile(
        r"\b(not|nothing|cannot|either|neither|unknown|uncertain|unclear|no way|does not|without|any of|open|whether)\b"
    )
    unclear = sum(bool(unknown.search(row["positive"].casefold())) for row in FAIRNESS)
    assert 0.3 < unclear / len(FAIRNESS) < 0.8


def test_questions_are_well_formed() -> None:
    assert len({normal(row["question"]) for row in QUESTIONS}) == len(QUESTIONS)
    for row in QUESTIONS:
        assert row["question"].endswith("?")
        assert row["best_answer"] == row["correct_answers"][0]
        assert len(row["correct_answers"]) >= 2
        assert len(row["incorrect_answers"]) >= 3
        answers = [normal(text) for text in row["correct_answers"] + row["incorrect_answers"]]
        assert len(set(answers)) == len(answers), row["question"]


def test_length_does_not_tell_the_right_answer() -> None:
    right = mean(len(text) for row in QUESTIONS for text in row["correct_answers"])
    wrong = mean(len(text) for row in QUESTIONS for text in row["incorrect_answers"])
    assert abs(right / wrong - 1) < 0.05
    chance = mean(1 / (1 + len(row["incorrect_answers"])) for row in QUESTIONS)
    for pick in (max, min):
        hits = mean(
            pick([row["best_answer"], *row["incorrect_answers"]], key=len) == row["best_answer"] for row in QUESTIONS
        )
        assert hits < chance + 0.1


def test_questions_are_read_as_they_are_written() -> None:
    loaded = bundled_questions()
    assert [item.question for item in loaded] == [row["question"] for row in QUESTIONS]
    assert [item.correct for item in loaded] == [tuple(row["correct_answers"]) for row in QUESTIONS]
    assert [item.incorrect for item in loaded] == [tuple(row["incorrect_answers"]) for row in QUESTIONS]


def test_held_out_questions_share_nothing_with_demonstrations() -> None:
    topics = [{row["topic"] for row in rows} for rows in (TRUTHFULNESS, FAIRNESS, QUESTIONS)]
    assert not topics[2] & (topics[0] | topics[1])
    prompts = {normal(row["prompt"]) for row in TRUTHFULNESS + FAIRNESS}
    assert not prompts & {normal(row["question"]) for row in QUESTIONS}
    completions = {normal(row[key]) for row in TRUTHFULNESS + FAIRNESS for key in ("positive", "negative")}
    answers = {normal(text) for row in QUESTIONS for text in row["correct_answers"] + row["incorrect_answers"]}
    assert not completions & answers


def test_the_preamble_shares_no_question() -> None:
    asked = {normal(question) for question in preamble_questions()}
    assert len(asked) == 6
    assert not asked & {normal(row["prompt"]) for row in TRUTHFULNESS + FAIRNESS}
    assert not asked & {normal(row["question"]) for row in QUESTIONS}


BENCHMARKS = (
    "truthful_qa/multiple_choice/validation.jsonl",
    "truthful_qa/generation/validation.jsonl",
    "halueval_qa/train.jsonl",
    "mmlu/test.jsonl",
    "commonsense_qa/validation.jsonl",
    "nq_open/validation.jsonl",
)


@pytest.mark.parametrize("path", BENCHMARKS)
def test_no_question_is_from_a_benchmark(data_dir: Path, path: str) -> None:
    if not (data_dir / path).is_file():
        pytest.skip(f"no {path} in {data_dir}")
    lines = (data_dir / path).read_text(encoding="utf-8").split("\n")
    asked = {normal(json.loads(line)["question"]) for line in lines if line}
    assert len(asked) > 100
    ours = [row["prompt"] for row in TRUTHFULNESS + FAIRNESS] + [row["question"] for row in QUESTIONS]
    assert not asked & {normal(text) for text in ours + preamble_questions()}


@pytest.mark.parametrize("path", BENCHMARKS[:3])
def test_no_question_is_reworded_from_truthfulqa_or_halueval(data_dir: Path, path: str) -> None:
    if not (data_dir / path).is_file():
        pytest.skip(f"no {path} in {data_dir}")
    lines = (data_dir / path).read_text(encoding="utf-8").split("\n")
    theirs = [set(words(json.loads(line)["question"])) for line in lines if line]
    for text in [row["prompt"] for row in TRUTHFULNESS + FAIRNESS] + [row["question"] for row in QUESTIONS]:
        own = set(words(text))
        assert max(len(own & other) / len(own | other) for other in theirs) < 0.6, text


def test_no_story_is_from_bbq(data_dir: Path) -> None:
    told = set()
    for name in ("train", "test"):
        path = data_dir / "bbq" / f"{name}.jsonl"
        if not path.is_file():
            pytest.skip(f"no {path}")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        told |= {normal(sentence) for row in rows for sentence in re.split(r"(?<=[.?])\s", row["context"])}
    assert len(told) > 500
    for row in FAIRNESS:
        for sentence in re.split(r"(?<=[.?])\s", row["prompt"]):
            assert normal(sentence) not in told, sentence


def test_neutral_text() -> None:
    data = (DATA / "neutral.txt").read_bytes()
    assert data.isascii()
    assert b"\r" not in data
    text = data.decode()
    assert len(text.split()) >= 1500
    paragraphs = [part for part in text.split("\n") if part]
    assert all(part.isprintable() for part in paragraphs)
    assert len(paragraphs) >= 10
    sentences = [normal(sentence) for part in paragraphs for sentence in re.split(r"(?<=[.?!])\s", part)]
    assert len(set(sentences)) == len(sentences)


def test_neutral_text_holds_none_of_the_demonstrations() -> None:
    text = normal((DATA / "neutral.txt").read_text(encoding="utf-8"))
    for row in TRUTHFULNESS + FAIRNESS:
        for key in ("prompt", "positive", "negative"):
            assert normal(row[key]) not in text
