"""Settings of an evaluation: what is refused, and what is recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sealign.errors import SettingError
from sealign.evaluation.evaluation_config import EvaluationConfig


class Agreeing:
    """A judge that always says yes."""

    name = "agreeing"

    def decide(self, questions: Any, track: Any) -> list[bool]:
        """Return yes for each question."""
        return [True for _ in track(questions, "Judging", len(questions))]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tasks": []}, "no tasks and no demonstrations to score; name a task, such as truthfulqa_mc2"),
        ({"tasks": ["bbq", "bbq"]}, "task 'bbq' is named 2 times; name it once"),
        ({"tasks": ["bbq"], "control_seeds": [3, 1, 3]}, "control seed '3' is named 2 times; name it once"),
        ({"tasks": ["bbq"], "limit": 0}, "limit is 0, but it must be at least 1"),
        ({"tasks": ["bbq"], "batch_size": 0}, "batch_size is 0, but it must be at least 1"),
        ({"tasks": ["bbq"], "judge": "a name"}, "judge is 'a name', but it must be a Judge"),
    ],
)
def test_refusals(settings: Any, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        EvaluationConfig(**settings)


def test_settings_are_recorded_as_json_values_and_a_judge_by_its_name() -> None:
    config = EvaluationConfig(tasks=["bbq"], data_dir=Path("data"), judge=Agreeing())
    recorded = config.dump()
    assert (recorded["tasks"], recorded["data_dir"], recorded["judge"]) == (["bbq"], "data", "agreeing")
    assert recorded["control_seeds"] == [0, 1, 2]
