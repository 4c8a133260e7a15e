"""Facts that several files state are the same in all of them."""

from __future__ import annotations

import re
from pathlib import Path

import sealign

ROOT = Path(__file__).resolve().parents[2]


def test_the_version_of_the_citation_is_that_of_the_package() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (\S+)$", citation, re.MULTILINE) == [sealign.__version__]
