"""Rows of preference data sets, in the forms that people have."""

from __future__ import annotations

import random
from typing import Any

import pytest

from sealign.demonstrations.demonstration import Demonstration, Turn
from sealign.demonstrations.preference_rows import preference_parser
from sealign.demonstrations.sources import load_demonstrations
from sealign.errors import DemonstrationError


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


SYSTEM, ASKED = message("system", "Be brief."), message("user", "Hello.")
GREETED, QUESTION = message("assistant", "Hi."), message("user", "What is ice?")
GOOD, BAD = message("assistant", "Water."), message("assistant", "Air.")
PLAIN = Demonstration("What is ice?", "Water.", "Air.")
AFTER = Demonstration(
    "What is ice?", "Water.", "Air.", (Turn("system", "Be brief."), Turn("user", "Hello."), Turn("assistant", "Hi."))
)


def parse(row: dict[str, Any], **columns: str) -> Demonstration:
    found = preference_parser(columns)(row, random.Random(0))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "What is ice?", "positive": "Water.", "negative": "Air."}, PLAIN),
        ({"prompt": "What is ice?", "chosen": "Water.", "rejected": "Air."}, PLAIN),
        ({"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]}, PLAIN),
        ({"prompt": "What is ice?", "chosen": [GOOD], "rejected": "Air."}, PLAIN),
        ({"prompt": [SYSTEM, ASKED, GREETED, QUESTION], "positive": [GOOD], "negative": "Air."}, AFTER),
        # Whole conversations, with a prompt beside them or without.
        ({"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}, PLAIN),
        ({"prompt": "What is ice?", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}, PLAIN),
        ({k: [SYSTEM, ASKED, GREETED, QUESTION, v] for k, v in (("chosen", GOOD), ("rejected", BAD))}, AFTER),
        (
            {"prompt": [ASKED, GREETED, QUESTION], "chosen": [SYSTEM, GOOD], "rejected": [SYSTEM, BAD]},
            AFTER,
        ),
        (
            {"prompt": [message("user", [{"type": "text", "text": "What "}, {"type": "text", "text": "is ice?"}])]}
            | {"chosen": "Water.", "rejected": "Air."},
            PLAIN,
        ),
    ],
)
def test_rows_of_all_forms(row: dict[str, Any], expected: Demonstration) -> None:
    assert parse(row) == expected


def test_columns_of_other_names() -> None:
    row = {"question": "What is ice?", "best_answer": "Water.", "incorrect_answers": ["Air.", "Fire."], "chosen": "x"}
    columns = {"prompt": "question", "positive": "best_answer", "negative": "incorrect_answers"}
    drawn = {preference_parser(columns)(row, random.Random(seed)) for seed in range(9)}
    assert {item.negative for item in drawn if item is not None} == {"Air.", "Fire."}
    assert parse(row, **columns).positive == "Water."
    with pytest.raises(
        DemonstrationError, match="no key 'best', found question, .*; add or rename it, or name it by co"
    ):
        parse(row, **(columns | {"positive": "best"}))
    with pytest.raises(DemonstrationError, match="unknown part of a demonstration 'promt' .did you mean 'prompt'"):
        parse(row, promt="question")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": [QUESTION, GOOD], "rejected": [ASKED, BAD]}, "conversations of both .* equal up to their last"),
        ({"prompt": "a", "chosen": [QUESTION], "rejected": [BAD]}, "completion ends with the user, .* the assistant"),
        (
            {"prompt": [QUESTION, GREETED], "chosen": "b", "rejected": "c"},
            "prompt ends with the assistant, .* the user",
        ),
        ({"prompt": [], "chosen": "b", "rejected": "c"}, "'prompt' is an empty list; give a text or messages"),
        ({"prompt": [{"from": "user"}], "chosen": "b", "rejected": "c"}, "a message needs a role and a content"),
        ({"prompt": [message("tool", "a"), QUESTION], "chosen": "b", "rejected": "c"}, "the role 'tool', but it must"),
        ({"prompt": "a", "chosen": None, "rejected": "c"}, "'positive' is None, but it must be a non-empty string"),
        ({"prompt": 7, "chosen": "b", "rejected": "c"}, "'prompt' is 7, but it must be a non-empty string"),
        (
            {"prompt": [message("user", [{"type": "image"}])], "chosen": "b", "rejected": "c"},
            "'prompt' has a content with image, but it must be text",
        ),
    ],
)
def test_rows_that_are_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DemonstrationError, match=reason):
        parse(row)


def test_columns_of_named_sources_are_known() -> None:
    for source in ("bundled:truthfulness", "truthfulqa"):
        with pytest.raises(DemonstrationError, match=f"those of '{source}' are known; leave them out"):
            load_demonstrations(source, columns={"prompt": "question"})
