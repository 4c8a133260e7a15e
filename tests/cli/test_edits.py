from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import sealign
from sealign.cli.consoles import output
from sealign.edits.model_card import show_effect
from tests.cli import test_app as shared
from tests.cli.test_app import passed, refused, replaced, run, table_rows
from tests.edits.edit_data import make_edit
from tests.hub_stand_in import HubStandIn, hub_stand_in

cache = shared.cache


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    with hub_stand_in(monkeypatch, tmp_path / "downloads") as hub:
        yield hub


def test_pushed_found_and_pulled_with_what_was_measured(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_edit().save_pretrained(tmp_path / "edit")
    result = run("edits", "push", tmp_path / "edit", "me/unknown", "--private")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{hub.url}/me/unknown/commit/")
    assert result.stderr == "note: the card does not show what the edit gains and costs; run sealign evaluate first.\n"
    card = tmp_path / "edit" / "README.md"
    card.write_text(show_effect(card.read_text(), "**Helps**: by a lot.", verdict="helps", loss_increase=0.0214))
    passed("edits", "push", tmp_path / "edit", "me/polite")

    monkeypatch.setattr(output, "width", 120)
    assert table_rows(passed("edits", "search")) == [
        ["me/unknown", "owner/tiny-llama", "sea", "not evaluated", "", "10"],
        ["me/polite", "owner/tiny-llama", "sea", "helps", "+0.021", "9"],
    ]
    (found,) = json.loads(passed("edits", "search", "polite", "--base-model", "owner/tiny-llama", "--json"))
    assert (found["repo_id"], found["verdict"]) == ("me/polite", "helps")

    text = passed("edits", "pull", "me/polite", "--output", tmp_path / "mine")
    assert "An edit of owner/tiny-llama by the method sea. Its card says:\n\nHelps: by a lot." in text
    assert sealign.load_edit(tmp_path / "mine").hash == sealign.load_edit(tmp_path / "edit").hash
    refused("edits", "pull", "me/unknown", "--output", tmp_path / "mine", words=("--overwrite",))
    assert "Not evaluated" in replaced("edits", "pull", "me/unknown", "--output", tmp_path / "mine")
    refused("edits", "pull", "me/none", "--output", tmp_path / "none", words=("'me/none' is neither a folder",))
