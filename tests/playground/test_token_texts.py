from __future__ import annotations

from typing import Any

import pytest

from sealign.playground.token_texts import TokenTexts, token_name


@pytest.mark.parametrize(
    "text", ["The river froze.", "a \N{SNOWMAN} b\n\n  c", "na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve \U0001f9ca!"]
)
def test_the_texts_of_tokens_are_the_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    texts = TokenTexts(tokenizer)
    pieces = [texts.add(token) for token in ids]
    assert "".join(pieces) == text
    assert texts.text == text.strip()
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    # The bytes of a character: the last one has all of it.
    assert (len(ids) > len(text)) <= ("" in pieces)


def test_special_tokens_have_no_text(tokenizer: Any) -> None:
    texts = TokenTexts(tokenizer)
    ids = [*tokenizer.encode(" ice"), tokenizer.eos_token_id]
    assert [texts.add(token) for token in ids][-1] == ""
    assert texts.text == "ice"


def test_a_tokenizer_that_changes_earlier_text() -> None:
    class Closing:
        """A stand-in that joins a comma to the word before it once the next word comes."""

        words = ("ice", " ,", " snow")

        def decode(self, ids: list[int], **_: Any) -> str:
            text = "".join(self.words[index] for index in ids)
            return text.replace(" , ", ", ")

    texts = TokenTexts(Closing())  # type: ignore[arg-type]
    assert [texts.add(token) for token in (0, 1)] == ["ice", " ,"]
    assert texts.add(2) == "snow"
    assert texts.text == "ice, snow"


def test_names_of_tokens_are_readable(tokenizer: Any) -> None:
    (snow, *_), space = tokenizer.encode("\N{SNOWMAN}"), tokenizer.encode(" the")[0]
    assert token_name(tokenizer, space).startswith(" t")
    assert token_name(tokenizer, tokenizer.eos_token_id) == "<eos>"
    part = token_name(tokenizer, snow)  # a byte, which is no text
    assert part
    assert "\N{REPLACEMENT CHARACTER}" not in part
    assert token_name(tokenizer, len(tokenizer) + 5) == str(len(tokenizer) + 5)  # a row that no token uses

    class SentencePiece:
        def decode(self, ids: list[int]) -> str:
            return "the"

        def convert_ids_to_tokens(self, token: int) -> str:
            return "\N{LOWER ONE EIGHTH BLOCK}the"

    assert token_name(SentencePiece(), 4) == " the"  # type: ignore[arg-type]
