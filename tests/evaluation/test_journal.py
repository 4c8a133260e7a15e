from __future__ import annotations

import json
from pathlib import Path

import pytest

from sealign.evaluation.journal import Journal


def test_results_outlive_the_process(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "scores.jsonl"
    first = Journal(path)
    keys = [Journal.key("a", [1, 2]), Journal.key("a", [12]), Journal.key("b", [1, 2])]
    assert len(set(keys)) == 3
    first.put({keys[0]: [-1.25, True]})
    first.put({keys[1]: "text\nwith lines", keys[2]: 0.1 + 0.2})
    again = Journal(path)
    assert len(again) == 3
    assert again.get(keys[0]) == [-1.25, True]
    assert again.get(keys[1]) == "text\nwith lines"
    assert again.get(keys[2]) == 0.1 + 0.2


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_an_unfinished_line_is_ignored(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "scores.jsonl"
    journal = Journal(path)
    journal.put({"first": 1})
    journal.put({"second" * 5: 2})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    torn = Journal(path)
    assert "first" in torn
    torn.put({"third": 3})
    after = Journal(path)
    assert after.get("first") == 1
    assert after.get("third") == 3
    assert ("second" * 5 in after) == (cut == 1)  # only the line's end was lost


def test_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    nan, below = float("nan"), float("-inf")
    Journal(path).put({"scores": [[below, False], (nan, True)], "score": below, "text": "nan"})
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    again = Journal(path)
    assert float(again.get("score")) == below
    (first, greedy), (second, _) = again.get("scores")
    assert (float(first), greedy, str(float(second))) == (below, False, "nan")


def test_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    journal = Journal(None)
    journal.put({"a": 1})
    assert "a" in journal
    assert "b" not in journal
    with pytest.raises(KeyError):
        journal.get("b")
    assert list(tmp_path.iterdir()) == []
