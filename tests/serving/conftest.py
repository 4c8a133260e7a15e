"""Servers that the tests of several files use: starting one takes half a minute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sealign
from tests.edit_server import EditServer, fit_and_save
from tests.serving.served_model import EDITS, QUESTIONS, STARTED, Answer, answers_by_hooks, start


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="session")
def edits(smollm2: Any, folder: Path) -> dict[str, sealign.Edit]:
    model, tokenizer = smollm2
    return fit_and_save(model, tokenizer, EDITS, folder / "edits")


@pytest.fixture(scope="session")
def prompts(smollm2: Any) -> list[list[int]]:
    return [smollm2[1].encode(question) for question in QUESTIONS]


@pytest.fixture(scope="session")
def expected(smollm2: Any, edits: dict[str, sealign.Edit], prompts: list[list[int]]) -> dict[str | None, list[Answer]]:
    """By hooks: what each edit, and none, makes of each prompt."""
    model, _ = smollm2
    found: dict[str | None, list[Answer]] = {None: answers_by_hooks(model, prompts)}
    for name, edit in edits.items():
        with sealign.apply_edit(model, edit):
            found[name] = answers_by_hooks(model, prompts)
    return found


@pytest.fixture(scope="session")
def server(
    folder: Path,
    edits: dict[str, sealign.Edit],  # noqa: ARG001  saves the edits
) -> Iterator[EditServer]:
    """A server with both routes and places for two LoRAs, one of which is taken at the start."""
    with start(folder, STARTED, "--edits-dir", str(folder / "edits"), "--max-edits", "2", log="server") as running:
        yield running
