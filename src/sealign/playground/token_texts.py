"""The texts of the tokens of an answer, which together are the text of the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenTexts:
    """The texts of tokens, one after another as the tokens come.

    The text of a token depends on those before it. A token that ends within a character has an empty text, and the
    token that completes the character has all of it. Special tokens, such as that of the end, have an empty text.

    Args:
        tokenizer: Tokenizer of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = ""

    @property
    def text(self) -> str:
        """Text of all tokens so far, without white space at its ends, as other commands print it."""
        return self._decode().strip()

    def add(self, token: int) -> str:
        """Append a token and return its text.

        Args:
            token: Id of the token.
        """
        self._tokens.append(token)
        text = self._decode().rstrip("\N{REPLACEMENT CHARACTER}")
        new = text[len(self._shown) :]  # what was shown stays, though a few tokenizers change it later
        self._shown += new
        return new

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))


def token_name(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return a readable name of a single token: its text, or what the vocabulary calls it if it is part of a character.

    Args:
        tokenizer: Tokenizer of the model.
        token: Id of the token.
    """
    text = str(tokenizer.decode([token]))
    name = tokenizer.convert_ids_to_tokens(token)
    name = name if isinstance(name, str) else ""
    if "\N{REPLACEMENT CHARACTER}" in text or not text:
        return name or str(token)
    # Decoders of SentencePiece drop the space at the beginning of a text.
    return f" {text}" if name.startswith("\N{LOWER ONE EIGHTH BLOCK}") and not text.startswith(" ") else text
