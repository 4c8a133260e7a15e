"""The bundled texts: written for this project, balanced, and apart from the benchmarks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sealign.demonstrations import load_prompts
from sealign.models.prompt_format import default_preamble
from tests.demonstrations.bundled_texts import BEHAVIOURS, DATA, DEMONSTRATIONS, normal, read, words

ASKED = [row["prompt"] for row in DEMONSTRATIONS]
ASKED += [prompt.text for name in BEHAVIOURS for prompt in load_prompts(f"bundled:{name}")]


def preamble_questions() -> list[str]:
    return re.findall(r"^Q: (.*)$", default_preamble(), re.MULTILINE)


def check_text(text: str) -> None:
    assert isinstance(text, str)
    assert text == text.strip() != ""
    assert text.isprintable()
    assert "  " not in text


@pytest.mark.parametrize("path", [f"behaviours/{name}" for name in BEHAVIOURS])
def test_files_are_clean_json_lines(path: str) -> None:
    data = (DATA / f"{path}.jsonl").read_bytes()
    assert data.endswith(b"}\n")
    assert b"\r" not in data
    assert b"\n\n" not in data
    rows = read(path)
    assert len(rows) == data.count(b"\n")
    for row in rows:
        assert set(row) == {"prompt", "positive", "negative", "topic"}
        for text in row.values():
            check_text(text)


def test_the_preamble_shares_no_question() -> None:
    asked = {normal(question) for question in preamble_questions()}
    assert len(asked) == 6
    assert not asked & {normal(row["prompt"]) for row in DEMONSTRATIONS}


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
    assert not asked & {normal(text) for text in ASKED + preamble_questions()}


@pytest.mark.parametrize("path", BENCHMARKS[:3])
def test_no_question_is_reworded_from_truthfulqa_or_halueval(data_dir: Path, path: str) -> None:
    if not (data_dir / path).is_file():
        pytest.skip(f"no {path} in {data_dir}")
    lines = (data_dir / path).read_text(encoding="utf-8").split("\n")
    theirs = [set(words(json.loads(line)["question"])) for line in lines if line]
    for text in ASKED:
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
    for row in BEHAVIOURS["fairness"]:
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


def test_ordinary_text_is_not_the_text_that_damage_is_measured_on() -> None:
    def sentences(text: str) -> set[str]:
        return {normal(part) for part in re.split(r"(?<=[.?!])\s|\n", text) if part.strip()}

    data = (DATA / "ordinary.txt").read_bytes()
    assert data.isascii()
    assert b"\r" not in data
    ordinary = sentences(data.decode())
    assert len(ordinary) >= 60
    assert not ordinary & sentences((DATA / "neutral.txt").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["neutral.txt", "ordinary.txt"])
def test_plain_text_holds_none_of_the_demonstrations(name: str) -> None:
    text = normal((DATA / name).read_text(encoding="utf-8"))
    for row in DEMONSTRATIONS:
        for key in ("prompt", "positive", "negative"):
            assert normal(row[key]) not in text
