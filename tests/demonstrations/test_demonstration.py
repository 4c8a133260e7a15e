"""A demonstration checks itself, and its hashes tell texts apart."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealign.demonstrations.demonstration import Demonstration, Turn, demonstrations_hash
from sealign.errors import DemonstrationError

KEYS = ("prompt", "positive", "negative")

texts = st.text(min_size=1, max_size=12).filter(lambda text: bool(text.strip()))
completions = st.tuples(texts, texts).filter(lambda pair: pair[0].strip() != pair[1].strip())
histories = st.lists(st.builds(Turn, st.sampled_from(["system", "user", "assistant"]), texts), max_size=2).map(tuple)
one = st.tuples(texts, completions, histories).map(lambda t: Demonstration(t[0], *t[1], t[2]))
demonstration_lists = st.lists(one, max_size=4)


def test_a_demonstration_checks_itself() -> None:
    assert Demonstration(" a ", "b", "c").prompt == " a "
    for name in KEYS:
        for value in ("", " \n", None, 3):
            message = re.escape(f"'{name}' is {value!r}, but it must be a non-empty string")
            with pytest.raises(DemonstrationError, match=message):
                Demonstration(**(dict.fromkeys(KEYS, "x") | {"negative": "y", name: value}))  # type: ignore[arg-type]
    assert Demonstration("\U0001f600", "b", "c").prompt == "\U0001f600"
    with pytest.raises(
        DemonstrationError, match=r"'positive' is .*, which contains a lone surrogate .*; replace or delete it"
    ):
        Demonstration("a", "smile \ud83d", "c")
    with pytest.raises(DemonstrationError, match="both 'b', but they must differ; change one"):
        Demonstration("a", "b", " b")


def test_the_history_is_checked() -> None:
    system = Turn("system", "Be brief.")
    assert Demonstration("a", "b", "c", (system,)).history == (system,)
    with pytest.raises(DemonstrationError, match="a turn has the role 'tool', but it must be system, user or assist"):
        Demonstration("a", "b", "c", (Turn("tool", "x"),))  # type: ignore[arg-type]
    with pytest.raises(DemonstrationError, match="'a turn of the user' is '', but it must be a non-empty string"):
        Demonstration("a", "b", "c", (system, Turn("user", "")))


def test_the_hash_of_one_demonstration_is_the_documented_one() -> None:
    item = Demonstration(" é", "b\n", "c")
    prompt = hashlib.sha256(b'["\\u00e9"]').hexdigest()[:16]
    assert item.prompt_hash == prompt
    completions = hashlib.sha256(b'["b", "c"]').hexdigest()[:16]
    assert item.hash == f"{prompt}-{completions}"
    # Hashes are recorded in edits, so that they must never change.
    assert Demonstration("a", "b", "c").hash == "0eb5b8d6f81bc677-86919fd96a3aba5b"
    assert item.hash == Demonstration("é", "b", "c").hash == Demonstration("é", "b", "c", topic="d").hash


@settings(max_examples=100, deadline=None, derandomize=True)
@given(first=one, second=one)
def test_hashes_of_demonstrations_are_equal_for_equal_texts_only(first: Demonstration, second: Demonstration) -> None:
    def prompt(item: Demonstration) -> object:
        return item.prompt.strip(), [(role, text.strip()) for role, text in item.history]

    def content(item: Demonstration) -> object:
        return prompt(item), item.positive.strip(), item.negative.strip()

    assert (first.hash == second.hash) == (content(first) == content(second))
    assert (first.prompt_hash == second.prompt_hash) == (prompt(first) == prompt(second))
    swapped = Demonstration(first.prompt, first.negative, first.positive, first.history)
    assert swapped.prompt_hash == first.prompt_hash
    assert swapped.hash != first.hash


def test_hash_is_the_documented_one() -> None:
    items = [Demonstration("a", "é", 'c"'), Demonstration("d", "e", "f")]
    expected = hashlib.sha256(b'["a", "\\u00e9", "c\\""]["d", "e", "f"]').hexdigest()
    assert demonstrations_hash(items) == expected
    assert demonstrations_hash(items[::-1]) != expected
    # Versions of Sealign must agree on what is recorded in edits.
    assert demonstrations_hash([Demonstration("a", "b", "c")]) == (
        "d33b202c020cbde1c4a7bb26d0b02e66645407dcef42c63543cff899b8f979c8"
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(first=demonstration_lists, second=demonstration_lists)
def test_hash_is_equal_for_equal_lists_only(first: Sequence[Demonstration], second: Sequence[Demonstration]) -> None:
    assert (demonstrations_hash(first) == demonstrations_hash(second)) == (first == second)
    assert demonstrations_hash(list(first)) == demonstrations_hash(first)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(texts=st.tuples(texts, texts, texts).filter(lambda t: len({text.strip() for text in t}) == 3))
def test_hash_sees_which_field_a_text_is_in(texts: tuple[str, str, str]) -> None:
    a, b, c = texts
    assert len({demonstrations_hash([Demonstration(*row)]) for row in [(a, b, c), (a, c, b), (b, a, c)]}) == 3
