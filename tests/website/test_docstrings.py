"""Docstrings in the form that griffe reads."""

from __future__ import annotations

from website.docstrings import as_griffe_reads, with_default

DOCSTRING = """Return a scale.

Of two lines, right, wrong: as they are.

Args:
    left, right: Factors,
        (d, r) each.
    strength: Strength, of a and b: at most 1. Default: that of the edit.

Example:
    >>> scale(1, 2)
    2
"""


def test_arguments_that_share_a_description_each_have_it() -> None:
    text = as_griffe_reads(DOCSTRING)
    assert "    left: Factors,\n        (d, r) each.\n    right: Factors,\n        (d, r) each.\n    strength:" in text
    assert "right, wrong: as they are" in text
    assert "\nExamples:\n    >>> scale" in text
    assert as_griffe_reads(text) == text


def test_a_default_ends_a_description_that_names_none() -> None:
    docstring = "Settings.\n\nAttributes:\n    rank: Rank,\n        at least 1.\n    site: Site. Default: own."
    assert with_default(docstring, "rank", r"'\\d'") == docstring.replace("least 1.", r"least 1. Default: ``'\\d'``.")
    assert with_default(docstring, "site", "1") == docstring
    assert with_default(docstring, "ran", "1") == docstring
