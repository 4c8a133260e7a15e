"""The bundled behaviours: many topics that share no wording, and two sides that differ in the behaviour alone."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from statistics import mean

import pytest
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from sklearn.metrics import roc_auc_score

from sealign.demonstrations import bundled_behaviours, load_demonstrations
from sealign.errors import DemonstrationError
from tests.demonstrations.bundled_texts import BEHAVIOURS, Row, normal, words

SIDES = ("positive", "negative")
BALANCED = sorted(set(BEHAVIOURS) - {"conciseness"})
"""The behaviours of which length is no part."""
Measure = Callable[[str], int]


def content(text: str) -> list[str]:
    return [word for word in words(text) if word not in ENGLISH_STOP_WORDS]


def marks(text: str) -> list[str]:
    """The marks that end the sentences of a text."""
    return re.findall(r"[.?!](?=\s|$)", text)


def predicts(rows: list[Row], measure: Measure) -> float:
    """The area under the ROC curve with which a measure of a completion predicts that it is the positive one."""
    labels = [side == "positive" for side in SIDES for _ in rows]
    return float(roc_auc_score(labels, [measure(row[side]) for side in SIDES for row in rows]))


def test_at_least_120_demonstrations_of_a_behaviour() -> None:
    assert bundled_behaviours() == sorted(BEHAVIOURS)
    for name, rows in BEHAVIOURS.items():
        assert len(load_demonstrations(f"bundled:{name}")) == len(rows) >= 120, name


def test_the_guide_lists_what_is_bundled() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \|", guide, re.MULTILINE)
    counted = [(name, str(len(rows)), str(len({row["topic"] for row in rows}))) for name, rows in BEHAVIOURS.items()]
    assert listed == counted


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_topics_are_many_and_of_one_size(name: str) -> None:
    counts = Counter(row["topic"] for row in BEHAVIOURS[name])
    assert len(counts) >= 10
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_texts_are_distinct(name: str) -> None:
    rows = BEHAVIOURS[name]
    for key in ("prompt", *SIDES):
        counts = Counter(normal(row[key]) for row in rows)
        assert [text for text, count in counts.items() if count > 1] == []
    assert not {normal(row["positive"]) for row in rows} & {normal(row["negative"]) for row in rows}


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_topics_share_no_wording(name: str) -> None:
    """No 3 content words that follow each other in a completion follow each other in one of another topic."""
    topics = defaultdict(set)
    for row in BEHAVIOURS[name]:
        for side in SIDES:
            found = content(row[side])
            for phrase in zip(found, found[1:], found[2:], strict=False):
                topics[phrase].add(row["topic"])
    assert [phrase for phrase, where in topics.items() if len(where) > 1] == []


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_completions_are_whole_sentences(name: str) -> None:
    for row in BEHAVIOURS[name]:
        for side in SIDES:
            text = row[side]
            assert text[0].isupper() or text[0].isdigit() or text[0] == '"', text
            assert text[-1] in ".?!", text


@pytest.mark.parametrize("name", BALANCED)
def test_both_sides_have_the_same_form(name: str) -> None:
    rows = BEHAVIOURS[name]
    for row in rows:
        assert marks(row["positive"]) == marks(row["negative"]), row
    for mark in ",;:'-":
        assert 0.4 < predicts(rows, methodcaller("count", mark)) < 0.6, mark


def word_count(text: str) -> int:
    return len(words(text))


@pytest.mark.parametrize(
    ("name", "measure"),
    # Formal words are longer, so that the sides of formality differ in characters, though not in words.
    [(name, measure) for name in BALANCED for measure in (len, word_count) if (name, measure) != ("formality", len)],
)
def test_length_does_not_predict_the_side(name: str, measure: Measure) -> None:
    rows = BEHAVIOURS[name]
    lengths = [(measure(row["positive"]), measure(row["negative"])) for row in rows]
    means = [mean(side) for side in zip(*lengths, strict=True)]
    assert abs(means[0] / means[1] - 1) < 0.05
    assert sum(positive > negative for positive, negative in lengths) <= 0.6 * len(rows)
    assert sum(positive < negative for positive, negative in lengths) <= 0.6 * len(rows)
    assert 0.4 < predicts(rows, measure) < 0.6
    for row, (positive, negative) in zip(rows, lengths, strict=True):
        assert 2 / 3 < positive / negative < 3 / 2, row


@pytest.mark.parametrize("name", BALANCED)
def test_completions_have_the_length_of_a_short_answer(name: str) -> None:
    for row in BEHAVIOURS[name]:
        for side in SIDES:
            assert 8 <= len(row[side].split()) <= 30, row


@pytest.mark.parametrize("name", BALANCED)
def test_no_single_word_tells_the_sides_apart(name: str) -> None:
    """No word is in 15 % more of the completions of one side, and none opens 10 % more of them."""
    rows = BEHAVIOURS[name]
    for last, most in ((None, 0.15), (1, 0.1)):
        positive, negative = (Counter(word for row in rows for word in set(words(row[side])[:last])) for side in SIDES)
        markers = {word for word in positive | negative if abs(positive[word] - negative[word]) > most * len(rows)}
        assert markers == set()


def test_concise_answers_say_the_same_in_fewer_words() -> None:
    """Length is the behaviour, and the long answer has every fact of the short one: all its words but the commonest."""
    rows = BEHAVIOURS["conciseness"]
    for row in rows:
        assert 5 <= len(row["positive"].split()) <= 15, row
        assert 30 <= len(row["negative"].split()) <= 60, row
        assert set(content(row["positive"])) <= set(words(row["negative"])), row
    for side in SIDES:
        counts = Counter(word for row in rows for word in set(content(row[side])))
        assert max(counts.values()) < 0.15 * len(rows)


def test_yes_and_no_do_not_tell_truth_from_falsehood() -> None:
    for opening in ("yes", "no"):
        counts = [sum(words(row[side])[0] == opening for row in BEHAVIOURS["truthfulness"]) for side in SIDES]
        assert min(counts) >= 10
        assert max(counts) / min(counts) < 1.5


@pytest.mark.parametrize("source", ["bundled:fairnes", "bundled:", "bundled:fairness.jsonl", "bundled:../neutral"])
def test_unknown_names_are_refused(source: str) -> None:
    with pytest.raises(DemonstrationError, match="unknown bundled demonstrations .*fairness, "):
        load_demonstrations(source)
