from __future__ import annotations

import json
from pathlib import Path

from sealign.files import hold_lock
from tests.cli import test_app as shared
from tests.cli.test_app import passed, refused, run, table_rows

cache = shared.cache


def write(cache: Path) -> None:
    for name, size in (("models/small/weights", 2000), ("models/large/weights", 3_500_000), ("adapters/0f/a", 12)):
        (cache / name).parent.mkdir(parents=True)
        (cache / name).write_bytes(b"x" * size)


def test_the_list_has_kinds_sizes_and_the_sum(cache: Path) -> None:
    write(cache)
    text = passed("cache", "list")
    assert [row[:3] for row in table_rows(text)] == [
        ["models", "large", "3.5 MB"],
        ["models", "small", "2.0 kB"],
        ["adapters", "0f", "12 bytes"],
    ]
    assert "3.5 MB in all" in text
    data = json.loads(passed("cache", "list", "--json"))
    assert data["folder"] == str(cache)
    assert [entry["size"] for entry in data["entries"]] == [3_500_000, 2000, 12]


def test_clearing_says_what_went_and_what_was_left(cache: Path) -> None:
    write(cache)
    with hold_lock(cache / "models" / "small.lock"):
        result = run("cache", "clear")
    assert result.exit_code == 0
    assert [row[:2] for row in table_rows(result.stdout)] == [["models", "large"]]
    assert result.stderr == f"'{cache / 'models' / 'small'}' is in use and was left.\n"
    removed = json.loads(passed("cache", "clear", "--kinds", "adapters,models", "--json"))["removed"]
    assert [Path(entry["path"]).name for entry in removed] == ["small", "0f"]
    refused("cache", "clear", "--kinds", "everything", words=("unknown kind 'everything'", "models, fits"))
