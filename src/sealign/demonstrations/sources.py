"""Sources of demonstrations: files, named datasets, the bundled sets and the Hub."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sealign.demonstrations.bundled import BUNDLED_PREFIX, bundled_behaviours, bundled_path
from sealign.demonstrations.demonstration import Demonstration
from sealign.demonstrations.preference_rows import Parse, preference_parser
from sealign.demonstrations.row_files import FORMATS, PlacedRows, Row, read_rows
from sealign.errors import DemonstrationError, first_sentence, unknown_name
from sealign.hub import hub_access

CROWS_PROMPT_WORDS = 3
"""Smallest number of shared first words with which a pair of CrowS-Pairs is a demonstration."""


def load_demonstrations(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Demonstration]:
    """Load demonstrations from a file, a bundled set, a named dataset, or a dataset on the Hugging Face Hub.

    Args:
        source: One of

            - a ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file with the keys or columns ``prompt``,
              ``positive`` or ``chosen``, ``negative`` or ``rejected``, as texts or as lists of messages, and perhaps
              ``topic``;
            - ``bundled:NAME``, one of the behaviours that ``bundled_behaviours`` lists, written for this project;
            - ``halueval_qa``, ``bbq``, ``truthfulqa`` or ``crows_pairs`` (the pairs whose sentences begin with the same
              three words or more, which are the prompt), read from ``data_dir`` if given, else from the Hub;
            - the id of a Hub dataset with such columns, as ``owner/name``, ``owner/name:configuration`` or
              ``owner/name:configuration:split``; the default split is ``train``.
        columns: Names of columns of a file or Hub dataset, where they are others; for example
            ``{"prompt": "question", "positive": "best_answer", "negative": "incorrect_answers"}``. Where a column holds
            a list of texts, one is drawn.
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
    if columns and (text.startswith(BUNDLED_PREFIX) or text in NAMED_SOURCES):
        raise DemonstrationError(f"columns are given, but those of '{text}' are known; leave them out")
    plain = preference_parser(columns)
    if text.startswith(BUNDLED_PREFIX):
        demonstrations = _parse(read_rows(bundled_path(text, ".jsonl")), plain, seed)
    elif text in NAMED_SOURCES:
        demonstrations = _load_named(NAMED_SOURCES[text], data_dir, seed)
    elif Path(text).is_file() or Path(text).suffix.lower() in FORMATS:
        demonstrations = _parse(read_rows(Path(text)), plain, seed)
    elif "/" in text and not Path(text).exists():
        repository, _, rest = text.partition(":")
        subset, _, split = rest.partition(":")
        demonstrations = _parse(_read_hub(repository, subset or None, split or "train"), plain, seed)
    elif Path(text).is_dir():
        raise DemonstrationError(f"'{text}' is a folder; name a file in it ({', '.join(FORMATS)})")
    else:
        known = [*NAMED_SOURCES, *(BUNDLED_PREFIX + name for name in bundled_behaviours())]
        raise DemonstrationError(
            f"{unknown_name('demonstration source', text, known)}, a file ({', '.join(FORMATS)}), or a Hub dataset id"
        )
    return _draw(demonstrations, text, limit, seed)


def _halueval_qa(row: Row, _: random.Random) -> Demonstration:
    return Demonstration(row["question"], row["right_answer"], row["hallucinated_answer"])


def _bbq(row: Row, generator: random.Random) -> Demonstration:
    # The negative completion is one of the two wrong answers at random, as in the paper.
    label = int(row["label"])
    wrong = generator.choice([index for index in range(3) if index != label])
    return Demonstration(f"{row['context']} {row['question']}", row[f"ans{label}"], row[f"ans{wrong}"])


def _truthfulqa(row: Row, generator: random.Random) -> Demonstration:
    return Demonstration(row["question"], row["best_answer"], generator.choice(row["incorrect_answers"]))


def _crows_pairs(row: Row, _: random.Random) -> Demonstration | None:
    # The sentences have no prompt; the words that both begin with are one, where there are enough of them.
    fairer, stereotype = row["sent_less"].split(), row["sent_more"].split()
    shared = len(os.path.commonprefix([fairer, stereotype]))  # noqa: RUF071 - of lists, as documented
    if not CROWS_PROMPT_WORDS <= shared < min(len(fairer), len(stereotype)):
        return None
    return Demonstration(" ".join(fairer[:shared]), " ".join(fairer[shared:]), " ".join(stereotype[shared:]))


@dataclass(frozen=True)
class _NamedSource:
    """A named dataset.

    Attributes:
        local: Path of the file in a data folder.
        hub: Repository, subset and split on the Hub.
        parse: Function of a row and a random generator that returns the demonstration, or None to leave the row out.
    """

    local: str
    hub: tuple[str, str | None, str]
    parse: Parse


NAMED_SOURCES: Mapping[str, _NamedSource] = {
    "halueval_qa": _NamedSource("halueval_qa/train.jsonl", ("pminervini/HaluEval", "qa", "data"), _halueval_qa),
    "bbq": _NamedSource("bbq/train.jsonl", ("Elfsong/BBQ", None, "train"), _bbq),
    "truthfulqa": _NamedSource(
        "truthful_qa/generation/validation.jsonl",
        ("truthfulqa/truthful_qa", "generation", "validation"),
        _truthfulqa,
    ),
    "crows_pairs": _NamedSource(
        "crows_pairs/test.jsonl", ("jannalu/crows_pairs_multilingual", "english", "test"), _crows_pairs
    ),
}


def _load_named(source: _NamedSource, data_dir: str | Path | None, seed: int) -> list[Demonstration]:
    if data_dir is not None:
        path = Path(data_dir) / source.local
        return _parse(read_rows(path), source.parse, seed)
    repository, subset, split = source.hub
    return _parse(_read_hub(repository, subset, split), source.parse, seed)


def _read_hub(repository: str, subset: str | None, split: str) -> PlacedRows:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DemonstrationError(
            f"loading '{repository}' from the Hub needs the datasets extra: pip install 'sealign[datasets]'"
        ) from error
    try:
        with hub_access():
            rows = load_dataset(repository, subset, split=split)
    except Exception as error:  # the Hub client raises many unrelated types
        raise DemonstrationError(
            f"cannot load dataset '{repository}' from the Hub ({_reason(error)}); "
            "check its name, configuration and split and the network, or give a local folder with data_dir (--data-dir)"
        ) from error
    for index, row in enumerate(rows):
        yield f"{repository}, row {index}", row


def _reason(error: Exception) -> str:
    """Return the beginning of an error of the Hub client; a wrong configuration or split is a ValueError."""
    return first_sentence(error) if isinstance(error, ValueError) else type(error).__name__


def _parse(rows: PlacedRows, parse: Parse, seed: int) -> list[Demonstration]:
    generator, found = random.Random(seed), []
    for place, row in rows:
        try:
            if (demonstration := parse(row, generator)) is not None:
                found.append(demonstration)
        except KeyError as error:
            raise DemonstrationError(
                f"{place}: no key {error.args[0]!r}, found {', '.join(map(str, row)) or 'none'}; add or rename it"
            ) from error
        except DemonstrationError as error:
            raise DemonstrationError(f"{place}: {error}") from error
        except (TypeError, ValueError, IndexError) as error:
            raise DemonstrationError(f"{place}: a field has the wrong type or is empty ({error})") from error
    return found


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
