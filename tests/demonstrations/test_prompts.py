"""Prompts are read line by line, and the bundled ones are about something else than the demonstrations."""

from __future__ import annotations

from pathlib import Path

import pytest

from sealign.demonstrations import bundled_behaviours, load_prompts
from sealign.errors import DemonstrationError
from tests.demonstrations.bundled_texts import BEHAVIOURS, normal, words


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_every_behaviour_has_prompts_of_its_own_topics(name: str) -> None:
    prompts = load_prompts(f"bundled:{name}")
    assert 10 <= len({normal(prompt) for prompt in prompts}) == len(prompts) <= 16
    rows = BEHAVIOURS[name]
    known = {word for row in rows for key in ("prompt", "positive", "negative") for word in words(row[key])}
    for prompt in prompts:
        assert prompt[0].isupper()
        assert prompt[-1] in ".?"
        assert set(words(prompt)) - known, f"{prompt!r} is about nothing that the demonstrations leave out"


def test_bundled_prompts_are_not_shared() -> None:
    prompts = [normal(prompt) for name in bundled_behaviours() for prompt in load_prompts(f"bundled:{name}")]
    assert len(set(prompts)) == len(prompts)


def test_a_file_has_a_prompt_on_each_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffWhy?\r\n\n  Wer weiß\u2028es? \n".encode())
    assert load_prompts(path) == load_prompts(str(path)) == ["Why?", "Wer weiß\u2028es?"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    with pytest.raises(DemonstrationError, match="there is no file '.*prompts.txt'; give a text file or bundled:NAME"):
        load_prompts(path)
    path.write_bytes(b"a\xff\n")
    with pytest.raises(DemonstrationError, match="is not UTF-8 at byte 1; save it as UTF-8"):
        load_prompts(path)
    path.write_bytes(b" \n\n")
    with pytest.raises(DemonstrationError, match="is empty; write one prompt per line"):
        load_prompts(path)
    with pytest.raises(DemonstrationError, match="did you mean 'fairness'"):
        load_prompts("bundled:fairnes")
