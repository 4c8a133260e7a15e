from __future__ import annotations

import re

import pytest

from sealign.spellings import american, known_spelling

BRITISH = {
    "centred": "centered",
    "normalisation": "normalization",
    "quantisation": "quantization",
    "behaviours": "behaviors",
    "behaviour": "behavior",
    "randomised": "randomized",
    "colours": "colors",
    "centre": "center",
}


@pytest.mark.parametrize(("british", "other"), BRITISH.items())
def test_both_spellings_are_found(british: str, other: str) -> None:
    assert american(british) == american(other) == other
    for one, two in ((british, other), (other, british)):
        assert known_spelling(one, ["rank", two]) == two
        assert known_spelling(one, [one, two]) == one
        assert known_spelling(f"--no-{one}", [f"--no-{two}"]) == f"--no-{two}"
        assert known_spelling(f"training.{one}_scale", [f"training.{two}_scale"]) == f"training.{two}_scale"


@pytest.mark.parametrize("name", ["noise", "rise", "raise", "rank", "layers", "loss", "", "otherwise", "four"])
def test_words_with_one_spelling(name: str) -> None:
    assert american(name) == name
    assert known_spelling(name, [re.sub("is", "iz", name) + "x"]) == name
