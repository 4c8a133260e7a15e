from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import sealign
from sealign.edits.gallery import MOST, GalleryEdit, pull_edit, push_edit, search_edits
from sealign.edits.model_card import NOT_EVALUATED, show_effect, shown_effect
from sealign.errors import EditFileError
from tests.edits.edit_data import make_edit
from tests.hub_stand_in import HubStandIn, hub_stand_in


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    with hub_stand_in(monkeypatch, tmp_path / "downloads") as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An edit with the card of an evaluation, beside a file of the user's own."""
    make_edit(center=True).save_pretrained(tmp_path / "edit")
    card = tmp_path / "edit" / "README.md"
    shown = show_effect(card.read_text(), "**Helps** on mine.", verdict="helps", loss_increase=0.0214)
    card.write_text(shown)
    (tmp_path / "edit" / "notes.txt").write_text("private")
    return tmp_path / "edit"


def test_what_is_pushed_is_found_and_pulled(hub: HubStandIn, folder: Path, tmp_path: Path) -> None:
    url = push_edit(folder, "me/polite")
    assert url.startswith(f"{hub.url}/me/polite/commit/")
    assert hub.repositories["me/polite"].keys() == {"edit.json", "edit.safetensors", "README.md"}
    assert search_edits() == [GalleryEdit("me/polite", "owner/tiny-llama", "sea", "helps", 0.0214, 9)]

    hub.repositories["me/polite"]["edit.py"] = b"raise SystemExit"
    record = pull_edit("me/polite", tmp_path / "mine")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["README.md", "edit.json", "edit.safetensors"]
    assert not list(tmp_path.rglob("edit.py"))  # not even in the cache of the Hub's client
    pulled, own = sealign.load_edit(tmp_path / "mine"), sealign.load_edit(folder)
    assert pulled.hash == own.hash
    assert record == own.record
    assert shown_effect((tmp_path / "mine" / "README.md").read_text()) == "**Helps** on mine."
    with pytest.raises(EditFileError, match="overwrite"):
        pull_edit("me/polite", tmp_path / "mine")
    pull_edit("me/polite", tmp_path / "mine", overwrite=True)


def test_searches(hub: HubStandIn, folder: Path) -> None:
    push_edit(folder, "me/polite")
    make_edit().push_to_hub("you/merry-and-bright")
    assert shown_effect(hub.repositories["you/merry-and-bright"]["README.md"].decode()) == NOT_EVALUATED
    hub.repositories["them/model"] = {"README.md": b"---\ntags: [text-generation]\n---\n"}
    hub.repositories["them/odd"] = {"README.md": b"---\ntags: [sealign]\nsealign: none\nbase_model: [a/b, c/d]\n---\n"}
    assert [each.repo_id for each in search_edits()] == ["you/merry-and-bright", "me/polite", "them/odd"]
    odd = search_edits("odd")
    assert odd == [GalleryEdit("them/odd", None, None, None, None, 8)]
    (merry,) = search_edits("merry")
    assert (merry.method, merry.verdict, merry.loss_increase) == ("sea", None, None)
    assert search_edits(base_model="a/b") == []
    assert len(search_edits(base_model="owner/tiny-llama")) == 2
    for number in range(MOST):
        hub.repositories[f"more/{number}"] = {"README.md": b"---\ntags: [sealign]\n---\n"}
    assert len(search_edits()) == MOST


def test_refusals(hub: HubStandIn, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EditFileError, match="'me/none' is neither a folder nor a repository that can be downloaded"):
        pull_edit("me/none", tmp_path / "none")
    hub.repositories["them/model"] = {"README.md": b"x"}
    with pytest.raises(EditFileError, match=r"has no edit.json, so it is not an edit"):
        pull_edit("them/model", tmp_path / "none")
    push_edit(folder, "me/polite")
    hub.repositories["me/polite"]["edit.safetensors"] += b" "
    with pytest.raises(EditFileError, match="truncated or corrupted"):
        pull_edit("me/polite", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    hub.refuses = True
    with pytest.raises(
        EditFileError, match=r"cannot be uploaded to 'me/polite' \(.*403.*\); check the name, the login"
    ):
        push_edit(folder, "me/polite")
    before = len(hub.requests)
    with pytest.raises(EditFileError, match=r"has no edit.json"):
        push_edit(tmp_path, "me/other")
    assert len(hub.requests) == before  # refused before anything is sent


def test_without_a_network(hub: HubStandIn, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(EditFileError, match=r"the Hub cannot be searched \(OfflineModeIsEnabled\)"):
        search_edits()
    with pytest.raises(EditFileError, match="offline mode is enabled"):
        push_edit(folder, "me/polite")
    with pytest.raises(EditFileError, match="check the name and the network"):
        pull_edit("me/polite", tmp_path / "none")
    assert hub.requests == []
