from __future__ import annotations

import os
from pathlib import Path

import pytest

from sealign.cache import PATTERNS, SAFE_KINDS, CacheEntry, cache_dir, cache_entries, clear_cache
from sealign.cli.line_input import HISTORY_NAME
from sealign.errors import SettingError
from sealign.files import hold_lock

FILES = {
    "models/small-1a/config.json": ("models", 3),
    "models/large-2b/config.json": ("models", 5),
    "models/large-2b/model/part": ("models", 40),
    "fits/run-0/batch": ("fits", 7),
    "adapters/0f/adapter_model.safetensors": ("adapters", 11),
    "offload-x/weight.dat": ("offload", 13),
    HISTORY_NAME: ("history", 17),
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SEALIGN_CACHE", str(folder))
    for name, (_, size) in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)
    (folder / "own.txt").write_text("not ours")
    (folder / "models" / "small-1a.lock").touch()
    os.utime(folder / "fits" / "run-0" / "batch", (5e9, 5e9))
    return folder


def names(entries: list[CacheEntry]) -> list[tuple[str, str, int]]:
    return [(entry.kind, entry.path.name, entry.size) for entry in entries]


def test_the_folder_is_that_of_the_environment(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_dir() == cache
    monkeypatch.delenv("SEALIGN_CACHE")
    assert cache_dir().name == "sealign"


def test_entries_by_kind_and_size(cache: Path) -> None:
    assert names(cache_entries()) == [
        ("models", "large-2b", 45),
        ("models", "small-1a", 3),
        ("fits", "run-0", 7),
        ("adapters", "0f", 11),
        ("offload", "offload-x", 13),
        ("history", HISTORY_NAME, 17),
    ]
    assert {entry.path.name: entry.changed for entry in cache_entries()}["run-0"] == 5e9
    assert {kind for kind, _ in FILES.values()} == PATTERNS.keys()
    assert all(entry.path.is_relative_to(cache) for entry in cache_entries())


def test_an_absent_folder_is_empty(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEALIGN_CACHE", str(cache / "none"))
    assert cache_entries() == []
    assert clear_cache(PATTERNS) == ([], [])


def test_what_a_process_uses_is_left(cache: Path) -> None:
    before = cache_entries()
    with hold_lock(cache / "models" / "large-2b.lock"):
        removed, used = clear_cache()
    assert names(used) == [("models", "large-2b", 45)]
    assert names(removed) == [("models", "small-1a", 3), ("fits", "run-0", 7)]
    assert cache_entries() == [entry for entry in before if entry not in removed]
    assert (cache / "models/large-2b/model/part").is_file()


def test_kinds_are_removed_where_they_are_named(cache: Path) -> None:
    with pytest.raises(SettingError, match=r"unknown kind 'adapter' \(did you mean 'adapters'"):
        clear_cache(["history", "adapter"])
    assert len(cache_entries()) == 6
    removed, _ = clear_cache(["history", "offload"])
    assert names(removed) == [("offload", "offload-x", 13), ("history", HISTORY_NAME, 17)]
    clear_cache(PATTERNS)
    assert cache_entries() == []
    assert (cache / "own.txt").read_text() == "not ours"
    assert not list(cache.rglob("*.lock"))
    assert set(SAFE_KINDS) < PATTERNS.keys()
