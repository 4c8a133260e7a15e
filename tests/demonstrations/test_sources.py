from __future__ import annotations

import codecs
import csv
import io
import json
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sealign.demonstrations
from sealign.demonstrations.demonstration import Demonstration
from sealign.demonstrations.sources import load_demonstrations
from sealign.errors import DemonstrationError

ROWS = [
    ("What is ice?", "Frozen water.", "Frozen air, cut in blocks."),
    ('Who said "no"?', "Nobody knows.", "The baker,\nand twice."),
    ("Où est l'été?", "Après le printemps.", "第十三月"),
    ("Is fire cold?", "No.", "Yes."),
    ("Do fish swim?", "Most of them do.", "No, they walk."),
]
KEYS = ("prompt", "positive", "negative")

texts = st.text(min_size=1, max_size=12).filter(lambda text: bool(text.strip()))
completions = st.tuples(texts, texts).filter(lambda pair: pair[0].strip() != pair[1].strip())


def as_json_lines(rows: Sequence[tuple[str, ...]]) -> str:
    return "".join(json.dumps(dict(zip(KEYS, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)


def as_csv(rows: Sequence[tuple[str, ...]], separator: str = ",") -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n", delimiter=separator).writerows([KEYS, *rows])
    return buffer.getvalue()


def as_json(rows: Sequence[tuple[str, ...]]) -> str:
    return json.dumps([dict(zip(KEYS, row, strict=True)) for row in rows], ensure_ascii=False, indent=1)


WRITERS: dict[str, Callable[[Sequence[tuple[str, ...]]], str]] = {
    "x.jsonl": as_json_lines,
    "x.NDJSON": as_json_lines,
    "x.json": as_json,
    "x.csv": as_csv,
    "x.Csv": lambda rows: as_csv(rows, ";"),
    "x.tsv": lambda rows: as_csv(rows, "\t"),
}


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def fields(demonstrations: Sequence[Demonstration]) -> list[tuple[str, ...]]:
    return [(item.prompt, item.positive, item.negative) for item in demonstrations]


@pytest.mark.parametrize("name", WRITERS)
def test_files_give_their_rows_in_order(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, WRITERS[name](ROWS))
    assert fields(load_demonstrations(path)) == ROWS
    assert load_demonstrations(str(path)) == load_demonstrations(path)


@pytest.mark.parametrize("name", WRITERS)
def test_byte_order_mark_windows_line_ends_and_blank_lines_are_read_over(tmp_path: Path, name: str) -> None:
    rows = [ROWS[0], *ROWS[3:]]
    text = WRITERS[name](rows)
    assert fields(load_demonstrations(write(tmp_path, name, codecs.BOM_UTF8 + text.encode()))) == rows
    assert fields(load_demonstrations(write(tmp_path, name, text.replace("\n", "\r\n")))) == rows
    assert fields(load_demonstrations(write(tmp_path, name, text.replace("\n", "\n\n") + "\n\n"))) == rows
    assert fields(load_demonstrations(write(tmp_path, name, text.rstrip("\n")))) == rows


@pytest.mark.parametrize("name", WRITERS)
def test_unusual_line_separators_stay_inside_a_text(tmp_path: Path, name: str) -> None:
    rows = [("a\u2028b\x0bc", "d\x85e", "f\x1cg"), ROWS[0]]
    assert fields(load_demonstrations(write(tmp_path, name, WRITERS[name](rows)))) == rows


@settings(max_examples=50, deadline=None, derandomize=True)
@given(rows=st.lists(st.tuples(texts, completions).map(lambda t: (t[0], *t[1])), min_size=2, max_size=5))
def test_json_lines_keep_every_character(
    tmp_path_factory: pytest.TempPathFactory, rows: Sequence[tuple[str, ...]]
) -> None:
    path = write(tmp_path_factory.getbasetemp(), "any.jsonl", as_json_lines(rows))
    assert fields(load_demonstrations(path)) == rows


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "x.Parquet"
    parquet.write_table(pyarrow.table({key: [row[index] for row in ROWS] for index, key in enumerate(KEYS)}), path)
    assert fields(load_demonstrations(path)) == ROWS
    messages = [[{"role": "user", "content": row[0]}] for row in ROWS]
    columns = {"prompt": messages, "chosen": [row[1] for row in ROWS], "rejected": [row[2] for row in ROWS]}
    parquet.write_table(pyarrow.table(columns), path)
    assert fields(load_demonstrations(path)) == ROWS


@pytest.mark.parametrize("text", ['{"data": %s, "version": [1]}', "%s"])
def test_json_arrays_may_lie_in_an_object(tmp_path: Path, text: str) -> None:
    assert fields(load_demonstrations(write(tmp_path, "x.json", text % as_json(ROWS)))) == ROWS
    assert fields(load_demonstrations(write(tmp_path, "y.json", as_json_lines(ROWS)))) == ROWS


def test_other_keys_and_columns_are_ignored(tmp_path: Path) -> None:
    rows = [dict(zip(KEYS, row, strict=True)) | {"place": "ice"} for row in ROWS]
    path = write(tmp_path, "x.jsonl", "\n".join(map(json.dumps, rows)))
    assert fields(load_demonstrations(path)) == ROWS
    path = write(tmp_path, "x.csv", "place,negative,prompt,positive\nt,n,p,q\nt,m,r,s\n")
    assert fields(load_demonstrations(path)) == [("p", "q", "n"), ("r", "s", "m")]


def test_topics_are_read_where_they_are_given(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [dict(zip(KEYS, row, strict=True)) for row in ROWS[:4]]
    given: list[dict[str, Any]] = [{"topic": "ice"}, {}, {"topic": None}, {"topic": ""}]
    path = write(
        tmp_path, "x.jsonl", "\n".join(json.dumps(row | topic) for row, topic in zip(rows, given, strict=True))
    )
    assert [item.topic for item in load_demonstrations(path)] == ["ice", None, None, None]
    path = write(tmp_path, "x.csv", "topic,negative,prompt,positive\nsnow,n,p,q\n,m,r,s\n")
    assert [item.topic for item in load_demonstrations(path)] == ["snow", None]
    with pytest.raises(DemonstrationError, match="line 1: 'topic' is 3, but it must be a non-empty string"):
        load_demonstrations(write(tmp_path, "x.jsonl", json.dumps(rows[0] | {"topic": 3})))


GOOD = as_json_lines(ROWS[:2])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", "", "x.jsonl' is empty; write at least 2"),
        ("x.csv", " \n\t\n", "x.csv' is empty; write at least 2"),
        ("x.csv", "prompt,positive,negative\n", "has 0 demonstrations, but 2 are needed; add some"),
        ("x.jsonl", as_json_lines(ROWS[:1]), "x.jsonl' has 1 demonstrations, but 2 are needed; add some"),
        (
            "x.jsonl",
            GOOD + "\n{'prompt': 1}\n",
            r"x.jsonl, line 4: not JSON \(.* at column 2\); write one JSON object per line",
        ),
        ("x.jsonl", GOOD + GOOD[:30], r"x.jsonl, line 3: not JSON"),
        ("x.jsonl", "[1]\n" + GOOD, "x.jsonl, line 1: found a list, but every line must be a JSON object"),
        (
            "x.jsonl",
            GOOD + '{"prompt": "a", "positiv": "b"}',
            "line 3: no key 'positive' or 'chosen', found prompt, positiv; add or rename it, or name it by columns",
        ),
        ("x.jsonl", GOOD + "{}", "line 3: no key 'positive' or 'chosen', found none"),
        ("x.csv", "prompt,good,bad\na,b,c\n", "x.csv, line 2: no key 'positive' or 'chosen', found prompt, good, bad"),
        ("x.csv", "positive;negative\nb;c\n", "line 2: no key 'prompt', found positive, negative"),
        ("x.csv", "prompt;positive;negative\na;b;c;d\n", "line 2: .*enclose texts with semicolons in double quotes"),
        ("x.tsv", "prompt\tpositive\tnegative\na\tb\n", "line 2: 'negative' is None, but it must be a non-empty"),
        ("x.json", "[1]", "x.json, item 0: found a int, but every item must be a JSON object"),
        ("x.jsonl", GOOD + "[" * 100_000, "line 3: JSON that is nested too deeply; write texts"),
        ("x.json", "[" * 100_000, "x.json' is JSON that is nested too deeply; write an array of objects"),
        ("x.json", "{}", "x.json' holds no array of objects; write one, or one object per line in a .jsonl file"),
        ("x.json", '[{"prompt": }]', r"x.json' is not JSON \(.* at line 1, column 13\); write an array"),
        ("x.parquet", "PAR1", r"x.parquet' is not a Parquet file \(.*\); copy or download it again"),
        ("x.txt", "a", r"x.txt' has the suffix '.txt', but it must be one of .jsonl, .*, .parquet; convert it"),
        ("x.csv", "prompt,positive,negative\na,b,c\nd,e\n", "line 3: 'negative' is None, but it must be a non-empty"),
        ("x.csv", "prompt,positive,negative\n\na,b,c\n\n\nd,e,\n", "line 6: 'negative' is '', but it must be a non-em"),
        (
            "x.csv",
            "prompt,positive,negative\na,b,c\nWell, so?,d,e\n",
            "line 3: .*more fields than columns; enclose texts with commas in double quotes",
        ),
        (
            "x.csv",
            'prompt,positive,negative\na,b,c\nd,e,"f\ng,h,i\n',
            "from line 3 on: not CSV .*; close every quotation mark",
        ),
        ("x.csv", f'prompt,positive,negative\na,b,c\na,b,"{"c" * 140_000}"\n', "from line 3 on: not CSV .*field limit"),
        ("x.jsonl", GOOD + as_json_lines([("a", "  ", "c")]), "line 3: 'positive' is '  ', but it must be a non-empty"),
        ("x.jsonl", GOOD + '{"prompt": 7, "positive": "b", "negative": "c"}', "line 3: 'prompt' is 7, but it must be"),
        ("x.jsonl", GOOD + as_json_lines([("a", "same", " same\n")]), "line 3: .* both 'same', but they must differ"),
        (
            "x.jsonl",
            GOOD + r'{"prompt": "\udc00", "positive": "b", "negative": "c"}',
            "line 3: 'prompt' .* lone surrogate",
        ),
        ("x.jsonl", GOOD.encode() + b"\xe9\n", rf"x.jsonl' is not UTF-8 at byte {len(GOOD.encode())}; save it as"),
        ("x.csv", as_csv(ROWS).encode("utf-16"), "x.csv' is not UTF-8 at byte 0; save it as UTF-8"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    with pytest.raises(DemonstrationError, match=message):
        load_demonstrations(write(tmp_path, name, text))


@pytest.mark.parametrize("name", WRITERS)
def test_missing_files_and_folders(tmp_path: Path, name: str) -> None:
    with pytest.raises(DemonstrationError, match=f"there is no file '.*{name}'; check the path"):
        load_demonstrations(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(DemonstrationError, match=f"there is no file '.*{name}'; check the path"):
        load_demonstrations(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("halueval", "unknown demonstration source 'halueval' .did you mean 'halueval_qa'.*a file .*parquet.*"),
        ("truthfullqa", "did you mean 'truthfulqa'"),
        (
            "bundled:fairnes",
            "unknown bundled demonstrations 'fairnes' .did you mean 'fairness'.*fairness.*truthfulness",
        ),
        ("bundled:", "unknown bundled demonstrations ''"),
        ("qqqq.txt", "unknown demonstration source 'qqqq.txt'; choose one of: .*bundled:truthfulness.*Hub dataset id"),
    ],
)
def test_unknown_sources_get_a_suggestion(source: str, message: str) -> None:
    with pytest.raises(DemonstrationError, match=message):
        load_demonstrations(source)


def test_an_existing_folder_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(DemonstrationError, match=r"is a folder; name a file in it \(\.jsonl, "):
        load_demonstrations(tmp_path)


@pytest.mark.parametrize("name", sealign.demonstrations.bundled_behaviours())
def test_bundled_sources(name: str) -> None:
    loaded = load_demonstrations(f"bundled:{name}")
    path = Path(sealign.demonstrations.__file__).parent / "data" / "behaviours" / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert fields(loaded) == [tuple(row[key] for key in KEYS) for row in rows]
    assert [item.topic for item in loaded] == [row["topic"] for row in rows]


def raw_rows(data_dir: Path, path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data_dir / path).read_bytes().split(b"\n") if line]


def test_halueval(data_dir: Path) -> None:
    rows = raw_rows(data_dir, "halueval_qa/train.jsonl")
    loaded = load_demonstrations("halueval_qa", data_dir=data_dir)
    assert fields(loaded) == [(row["question"], row["right_answer"], row["hallucinated_answer"]) for row in rows]


def test_bbq_takes_one_of_the_two_wrong_answers(data_dir: Path) -> None:
    rows = raw_rows(data_dir, "bbq/train.jsonl")
    loaded = load_demonstrations("bbq", data_dir=str(data_dir))
    assert len(loaded) == len(rows)
    first = 0
    for item, row in zip(loaded, rows, strict=True):
        answers = [row["ans0"], row["ans1"], row["ans2"]]
        assert item.prompt == row["context"] + " " + row["question"]
        assert item.positive == answers.pop(row["label"])
        assert item.negative in answers
        first += item.negative == answers[0]
    assert 0.4 < first / len(rows) < 0.6
    assert load_demonstrations("bbq", data_dir=data_dir) == loaded
    other = load_demonstrations("bbq", data_dir=data_dir, seed=1)
    assert other != loaded
    assert [(item.prompt, item.positive) for item in other] == [(item.prompt, item.positive) for item in loaded]


def test_truthfulqa_takes_one_of_the_false_answers(data_dir: Path) -> None:
    rows = raw_rows(data_dir, "truthful_qa/generation/validation.jsonl")
    loaded = load_demonstrations("truthfulqa", data_dir=data_dir)
    for item, row in zip(loaded, rows, strict=True):
        assert (item.prompt, item.positive) == (row["question"], row["best_answer"])
        assert item.negative in row["incorrect_answers"]
    assert load_demonstrations("truthfulqa", data_dir=data_dir, seed=1) != loaded


@pytest.mark.parametrize(
    ("source", "path", "row", "message"),
    [
        ("bbq", "bbq/train.jsonl", {"context": "a", "question": "b", "label": "x"}, "line 1: a field has the wrong"),
        ("bbq", "bbq/train.jsonl", {"context": "a", "question": "b", "label": 3}, "line 1: no key 'ans3', found cont"),
        (
            "truthfulqa",
            "truthful_qa/generation/validation.jsonl",
            {"question": "a", "best_answer": "b", "incorrect_answers": []},
            "line 1: a field has the wrong type or is empty",
        ),
        ("halueval_qa", "halueval_qa/train.jsonl", {"question": "a"}, "line 1: no key 'right_answer', found question"),
    ],
)
def test_bad_rows_of_named_sources(tmp_path: Path, source: str, path: str, row: dict[str, Any], message: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(json.dumps(row))
    with pytest.raises(DemonstrationError, match=message):
        load_demonstrations(source, data_dir=tmp_path)


def test_a_data_folder_without_the_source(tmp_path: Path) -> None:
    with pytest.raises(DemonstrationError, match=r"there is no file '.*halueval_qa/train\.jsonl'; check the path"):
        load_demonstrations("halueval_qa", data_dir=tmp_path)


def test_limit_draws_without_repeats_in_order() -> None:
    everything = load_demonstrations("bundled:fairness")
    position = {item: index for index, item in enumerate(everything)}
    draws = [load_demonstrations("bundled:fairness", limit=11, seed=seed) for seed in range(5)]
    for draw in draws:
        indices = [position[item] for item in draw]
        assert len(indices) == 11
        assert indices == sorted(set(indices))
    assert len({tuple(draw) for draw in draws}) == 5
    assert load_demonstrations("bundled:fairness", limit=11, seed=3) == draws[3]
    assert load_demonstrations("bundled:fairness", limit=len(everything), seed=3) == everything


@pytest.mark.parametrize("limit", [-1, 0, 1])
def test_limit_below_two(limit: int) -> None:
    with pytest.raises(DemonstrationError, match=f"limit is {limit}, but a fit needs at least 2"):
        load_demonstrations("bundled:fairness", limit=limit)


def test_limit_above_what_is_there(tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", as_json_lines(ROWS))
    with pytest.raises(DemonstrationError, match="has 5 demonstrations, but 6 are needed; add some or lower the limit"):
        load_demonstrations(path, limit=6)


class FakeHub(types.ModuleType):
    """Stands for the datasets package and records how it is asked."""

    def __init__(self, rows: list[dict[str, Any]] | Exception) -> None:
        super().__init__("datasets")
        self.rows = rows
        self.calls: list[tuple[str, str | None, str]] = []

    def load_dataset(self, repository: str, subset: str | None, *, split: str) -> list[dict[str, Any]]:
        self.calls.append((repository, subset, split))
        if isinstance(self.rows, Exception):
            raise self.rows
        return self.rows


@pytest.mark.parametrize(
    ("source", "call", "row"),
    [
        ("me/mine", ("me/mine", None, "train"), {"prompt": "a", "positive": "b", "negative": "c"}),
        ("me/mine:small", ("me/mine", "small", "train"), {"prompt": "a", "chosen": "b", "rejected": "c"}),
        ("me/mine:small:test", ("me/mine", "small", "test"), {"prompt": "a", "chosen": "b", "rejected": "c"}),
        ("me/mine::test", ("me/mine", None, "test"), {"prompt": "a", "chosen": "b", "rejected": "c"}),
        (
            "halueval_qa",
            ("pminervini/HaluEval", "qa", "data"),
            {"question": "a", "right_answer": "b", "hallucinated_answer": "c"},
        ),
        (
            "bbq",
            ("Elfsong/BBQ", None, "train"),
            {"context": "a", "question": "?", "ans0": "c", "ans1": "b", "ans2": "c", "label": 1},
        ),
        (
            "truthfulqa",
            ("truthfulqa/truthful_qa", "generation", "validation"),
            {"question": "a", "best_answer": "b", "incorrect_answers": ["c"]},
        ),
    ],
)
def test_hub_datasets(
    monkeypatch: pytest.MonkeyPatch, source: str, call: tuple[str, str | None, str], row: dict[str, Any]
) -> None:
    hub = FakeHub([row] * 3)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    prompt = "a ?" if source == "bbq" else "a"
    assert fields(load_demonstrations(source, limit=2)) == [(prompt, "b", "c")] * 2
    assert hub.calls == [call]


def test_hub_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", FakeHub([{"prompt": "a", "chosen": "b"}]))
    with pytest.raises(
        DemonstrationError, match="me/mine, row 0: no key 'negative' or 'rejected', found prompt, chosen"
    ):
        load_demonstrations("me/mine")
    monkeypatch.setitem(sys.modules, "datasets", FakeHub(RuntimeError("a page of text")))
    message = r"cannot load dataset 'me/mine' from the Hub \(RuntimeError\); check its name, .* split .*--data-dir"
    with pytest.raises(DemonstrationError, match=message):
        load_demonstrations("me/mine")
    monkeypatch.setitem(sys.modules, "datasets", FakeHub(ValueError("Unknown split 'tst'. Should be one of ['test']")))
    with pytest.raises(
        DemonstrationError, match=r"'me/mine' from the Hub \(Unknown split 'tst'\); check its name, conf"
    ):
        load_demonstrations("me/mine::tst")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DemonstrationError, match=r"needs the datasets extra: pip install 'sealign\[datasets\]'"):
        load_demonstrations("bbq")


def test_the_hub_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    # Both read the environment only when they are imported, which may be before the tests set it.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DemonstrationError, match=r"cannot load dataset 'nobody/nothing-at-all' from the Hub .*network"):
        load_demonstrations("nobody/nothing-at-all")
