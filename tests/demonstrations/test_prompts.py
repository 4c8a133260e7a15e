"""Prompts are read line by line, and the bundled ones are about something else than the demonstrations."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sealign.demonstrations import Demonstration, Prompt, Turn, bundled_behaviours, load_prompts
from sealign.demonstrations.prompts import prompts_of
from sealign.errors import DemonstrationError
from tests.demonstrations.bundled_texts import BEHAVIOURS, normal, words


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_every_behaviour_has_prompts_of_its_own_topics(name: str) -> None:
    prompts = [prompt.text for prompt in load_prompts(f"bundled:{name}")]
    assert 10 <= len({normal(prompt) for prompt in prompts}) == len(prompts) <= 16
    rows = BEHAVIOURS[name]
    known = {word for row in rows for key in ("prompt", "positive", "negative") for word in words(row[key])}
    for prompt in prompts:
        assert prompt[0].isupper()
        assert prompt[-1] in ".?"
        assert set(words(prompt)) - known, f"{prompt!r} is about nothing that the demonstrations leave out"


def test_bundled_prompts_are_not_shared() -> None:
    prompts = [normal(prompt.text) for name in bundled_behaviours() for prompt in load_prompts(f"bundled:{name}")]
    assert len(set(prompts)) == len(prompts)


def test_a_file_has_a_prompt_on_each_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffWhy?\r\n\n  Wer weiß\u2028es? \n".encode())
    assert load_prompts(path) == load_prompts(str(path)) == [Prompt("Why?"), Prompt("Wer weiß\u2028es?")]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    with pytest.raises(DemonstrationError, match=r"no file '.*prompts.txt'; give a file of prompts or bundled:NAME"):
        load_prompts(path)
    path.write_bytes(b"a\xff\n")
    with pytest.raises(DemonstrationError, match="is not UTF-8 at byte 1; save it as UTF-8"):
        load_prompts(path)
    path.write_bytes(b" \n\n")
    with pytest.raises(DemonstrationError, match="is empty; write one prompt per line"):
        load_prompts(path)
    with pytest.raises(DemonstrationError, match="did you mean 'fairness'"):
        load_prompts("bundled:fairnes")


def test_rows_are_prompts_or_conversations(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    brief, ask = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}
    rows: list[dict[str, object]] = [
        {"prompt": "What is ice?", "positive": "not read"},
        {"prompt": [brief, ask]},
        {"messages": [brief, ask, {"role": "assistant", "content": "Because."}]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    asked = Prompt("Why?", (Turn("system", "Be brief."),))
    assert load_prompts(path) == [Prompt("What is ice?"), asked, asked]
    assert asked.hash == Demonstration("Why?", "a", "b", asked.history).prompt_hash != Prompt("Why?").hash


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "Why?"}, "line 1: no key 'prompt' or 'messages', found question; add or rename it"),
        ({"prompt": " "}, "line 1: 'prompt' is ' ', but it must be a non-empty string"),
        ({"messages": []}, "line 1: 'messages' has no message of the user at its end"),
        ({"messages": [{"role": "system", "content": "x"}]}, "'messages' has no message of the user at its end"),
        ({"messages": [{"role": "judge", "content": "x"}, {"role": "user", "content": "y"}]}, "has the role 'judge'"),
    ],
)
def test_rows_that_are_no_prompts(tmp_path: Path, row: dict[str, object], words: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(DemonstrationError, match=re.escape(words)):
        load_prompts(path)


def test_prompts_of_demonstrations_are_each_there_once() -> None:
    items = [Demonstration(prompt, f"{n}", "x") for n, prompt in enumerate(("b", "a", "b", "c"))]
    assert prompts_of(items) == [Prompt("b"), Prompt("a"), Prompt("c")]
    assert prompts_of(items, 2) == [Prompt("b"), Prompt("a")]
