"""Sources of demonstrations: files, named datasets, the bundled sets and the Hub."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sealign.demonstrations.bundled import BUNDLED_PREFIX, bundled_behaviours, bundled_path
from sealign.demonstrations.demonstration import Demonstration
from sealign.errors import DemonstrationError, unknown_name


def load_demonstrations(
    source: str | Path, *, data_dir: str | Path | None = None, limit: int | None = None, seed: int = 0
) -> list[Demonstration]:
    """Load demonstrations from a file, a bundled set, a named dataset, or a dataset on the Hugging Face Hub.

    Args:
        source: One of

            - a ``.jsonl`` or ``.csv`` file with the keys or columns ``prompt``, ``positive``, ``negative`` and,
              if wanted, ``topic``;
            - ``bundled:NAME``, one of the behaviours that ``bundled_behaviours`` lists, written for this project;
            - ``halueval_qa``, ``bbq`` or ``truthfulqa``, read from ``data_dir`` if given, else from the Hub;
            - the id of a Hub dataset with the columns ``prompt``, ``positive`` and ``negative``.
        data_dir: Folder with a named dataset in the schema of the Hub, for example as
            ``data_dir/halueval_qa/train.jsonl``.
        limit: Number of demonstrations to draw at random; all in their order if None. Must be at least 2.
        seed: Seed of the draw, and of the choice where a row has several negative completions.

    Raises:
        DemonstrationError: The source is unknown, missing or empty, a row is malformed (the message names it), or
            there are fewer than ``limit`` or fewer than 2 demonstrations.

    Example:
        >>> demonstrations = load_demonstrations("bundled:truthfulness", limit=3)
        >>> len(demonstrations)
        3
    """
    text = str(source)
    if text.startswith(BUNDLED_PREFIX):
        demonstrations = list(_parse(read_rows(bundled_path(text, ".jsonl")), _plain, seed))
    elif text in NAMED_SOURCES:
        demonstrations = _load_named(NAMED_SOURCES[text], data_dir, seed)
    elif Path(text).suffix in (".jsonl", ".csv"):
        demonstrations = list(_parse(read_rows(Path(text)), _plain, seed))
    elif "/" in text and not Path(text).exists():
        demonstrations = list(_parse(_read_hub(text, None, "train"), _plain, seed))
    else:
        known = [*NAMED_SOURCES, *(BUNDLED_PREFIX + name for name in bundled_behaviours())]
        raise DemonstrationError(
            f"{unknown_name('demonstration source', text, known)}, a .jsonl or .csv file, or a Hub dataset id"
        )
    return _draw(demonstrations, text, limit, seed)


def read_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (place, row) for each row of a JSONL or CSV file, where place is ``file, line N``.

    Args:
        path: File in UTF-8; the suffix ``.csv`` means CSV with a header, all others JSONL.

    Raises:
        DemonstrationError: The file is missing, empty or not UTF-8, or a line is no JSON object or CSV row.
    """
    if not path.is_file():
        raise DemonstrationError(f"there is no file '{path}'; check the path")
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        raise DemonstrationError(f"'{path}' is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    if not text.strip():
        raise DemonstrationError(f"'{path}' is empty; write at least 2 demonstrations")
    if path.suffix == ".csv":
        yield from _csv_rows(path, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DemonstrationError(
                f"{place}: not JSON ({error.msg} at column {error.colno}); write one JSON object per line"
            ) from error
        if not isinstance(row, dict):
            raise DemonstrationError(f"{place}: found a {type(row).__name__}, but every line must be a JSON object")
        yield place, row


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    last = 0
    try:
        for row in reader:
            last = reader.line_num
            place = f"{path}, line {last}"
            if None in row:
                raise DemonstrationError(
                    f"{place}: more fields than columns; enclose texts with commas in double quotes"
                )
            yield place, row
    except csv.Error as error:
        raise DemonstrationError(
            f"{path}, from line {last + 1} on: not CSV ({error}); close every quotation mark, and double those in texts"
        ) from error


def _plain(row: Mapping[str, Any], _: random.Random) -> Demonstration:
    return Demonstration(row["prompt"], row["positive"], row["negative"], topic=row.get("topic") or None)


def _halueval_qa(row: Mapping[str, Any], _: random.Random) -> Demonstration:
    return Demonstration(row["question"], row["right_answer"], row["hallucinated_answer"])


def _bbq(row: Mapping[str, Any], generator: random.Random) -> Demonstration:
    # The negative completion is one of the two wrong answers at random, as in the paper.
    label = int(row["label"])
    wrong = generator.choice([index for index in range(3) if index != label])
    return Demonstration(f"{row['context']} {row['question']}", row[f"ans{label}"], row[f"ans{wrong}"])


def _truthfulqa(row: Mapping[str, Any], generator: random.Random) -> Demonstration:
    return Demonstration(row["question"], row["best_answer"], generator.choice(row["incorrect_answers"]))


@dataclass(frozen=True)
class _NamedSource:
    """A named dataset.

    Attributes:
        local: Path of the file in a data folder.
        hub: Repository, subset and split on the Hub.
        parse: Function of a row and a random generator that returns the demonstration.
    """

    local: str
    hub: tuple[str, str | None, str]
    parse: Callable[[Mapping[str, Any], random.Random], Demonstration]


NAMED_SOURCES: Mapping[str, _NamedSource] = {
    "halueval_qa": _NamedSource("halueval_qa/train.jsonl", ("pminervini/HaluEval", "qa", "data"), _halueval_qa),
    "bbq": _NamedSource("bbq/train.jsonl", ("Elfsong/BBQ", None, "train"), _bbq),
    "truthfulqa": _NamedSource(
        "truthful_qa/generation/validation.jsonl",
        ("truthfulqa/truthful_qa", "generation", "validation"),
        _truthfulqa,
    ),
}


def _load_named(source: _NamedSource, data_dir: str | Path | None, seed: int) -> list[Demonstration]:
    if data_dir is not None:
        path = Path(data_dir) / source.local
        return list(_parse(read_rows(path), source.parse, seed))
    repository, subset, split = source.hub
    return list(_parse(_read_hub(repository, subset, split), source.parse, seed))


def _read_hub(repository: str, subset: str | None, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DemonstrationError(
            f"loading '{repository}' from the Hub needs the datasets extra: pip install 'sealign[datasets]'"
        ) from error
    try:
        rows = load_dataset(repository, subset, split=split)
    except Exception as error:  # the Hub client raises many unrelated types
        raise DemonstrationError(
            f"cannot load dataset '{repository}' from the Hub ({type(error).__name__}); "
            "check its name and the network, or give a local folder with data_dir (--data-dir)"
        ) from error
    for index, row in enumerate(rows):
        yield f"{repository}, row {index}", row


def _parse(
    rows: Iterator[tuple[str, Mapping[str, Any]]],
    parse: Callable[[Mapping[str, Any], random.Random], Demonstration],
    seed: int,
) -> Iterator[Demonstration]:
    generator = random.Random(seed)
    for place, row in rows:
        try:
            yield parse(row, generator)
        except KeyError as error:
            raise DemonstrationError(
                f"{place}: no key {error.args[0]!r}, found {', '.join(map(str, row)) or 'none'}; add or rename it"
            ) from error
        except DemonstrationError as error:
            raise DemonstrationError(f"{place}: {error}") from error
        except (TypeError, ValueError, IndexError) as error:
            raise DemonstrationError(f"{place}: a field has the wrong type or is empty ({error})") from error


def _draw(demonstrations: list[Demonstration], source: str, limit: int | None, seed: int) -> list[Demonstration]:
    needed = 2 if limit is None else limit
    if needed < 2:
        raise DemonstrationError(f"limit is {limit}, but a fit needs at least 2 demonstrations")
    if len(demonstrations) < needed:
        raise DemonstrationError(
            f"'{source}' has {len(demonstrations)} demonstrations, but {needed} are needed; add some or lower the limit"
        )
    if limit is None:
        return demonstrations
    chosen = sorted(random.Random(seed).sample(range(len(demonstrations)), limit))
    return [demonstrations[index] for index in chosen]
