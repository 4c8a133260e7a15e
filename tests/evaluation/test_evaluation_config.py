"""Settings of an evaluation: what is refused, and what is recorded."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from sealign.demonstrations import Demonstration, Prompt, Turn
from sealign.errors import SettingError
from sealign.evaluation.answer_measures import load_scorer
from sealign.evaluation.evaluation_config import EvaluationConfig
from sealign.evaluation.tuning_config import TuneConfig

TWO = [Prompt("Why?"), Prompt("How?")]


class Agreeing:
    """A judge that always says yes."""

    name = "agreeing"

    def decide(self, questions: Any, track: Any) -> list[bool]:
        """Return yes for each question."""
        return [True for _ in track(questions, "Judging", len(questions))]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tasks": []}, "no tasks, no demonstrations and no prompts to score; name a task, such as"),
        ({"tasks": ["bbq", "bbq"]}, "task 'bbq' is named 2 times; name it once"),
        ({"tasks": ["bbq"], "control_seeds": [3, 1, 3]}, "control seed '3' is named 2 times; name it once"),
        ({"tasks": ["bbq"], "limit": 0}, "limit is 0, but it must be at least 1"),
        ({"tasks": ["bbq"], "batch_size": 0}, "batch_size is 0, but it must be at least 1"),
        ({"tasks": ["bbq"], "judge": "a name"}, "judge is 'a name', but it must be a Judge"),
        ({"tasks": ["bbq"], "strengths": [1, 1.0]}, "strength '1.0' is named 2 times; name it once"),
        ({"tasks": ["bbq"], "measures": [load_scorer("tokens")]}, "measures and aims are .* but there are none"),
        ({"tasks": ["bbq"], "aims": {"loss": "lower"}}, "measures and aims are .* but there are none"),
        ({"prompts": [Prompt("Why?")]}, "there is 1 prompt, but intervals need at least 2"),
        ({"prompts": TWO, "measures": [load_scorer("loss=tokens")]}, "a measure is named 'loss', which is a metric"),
        ({"prompts": TWO, "measures": [load_scorer("tokens")] * 2}, "measure 'tokens' is named 2 times"),
        ({"prompts": TWO, "aims": {"repetitoin": "lower"}}, "unknown measure 'repetitoin' .did you mean 'repetition'"),
        ({"prompts": TWO, "aims": {"loss": "least"}}, "the aim of 'loss' is 'least', but it must be higher"),
        ({"tasks": ["bbq"], "apply_chat_template": True, "preamble": "x"}, "a preamble would stand before the chat"),
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


def test_prompts_and_measures_are_recorded_by_hash_and_identity() -> None:
    config = EvaluationConfig(prompts=TWO, measures=[load_scorer("thanks=regex:thank")], aims={"thanks": 0.5})
    dumped = config.dump()
    assert dumped["measures"] == {"thanks": "regex:thank"}
    assert dumped["aims"] == {"thanks": 0.5}
    assert dumped["prompts"] != config.replace(prompts=TWO[::-1]).dump()["prompts"]


def test_a_system_instruction_precedes_every_conversation() -> None:
    brief = Turn("system", "Be brief.")
    item = Demonstration("Why?", "a", "b", (brief, Turn("user", "x"), Turn("assistant", "y")))
    config = EvaluationConfig(prompts=TWO, demonstrations=[item], system_instruction="Be kind.")
    found = config.instructed()
    assert found.prompts == tuple(Prompt(prompt.text, (Turn("system", "Be kind."),)) for prompt in TWO)
    assert found.demonstrations is not None
    assert found.demonstrations[0].history == (Turn("system", "Be kind.\n\nBe brief."), *item.history[1:])
    assert config.replace(system_instruction=None).instructed().prompts == tuple(TWO)


@pytest.mark.parametrize("given", [{"data_dir": Path("data")}, {"limit": 3}])
def test_settings_of_tasks_without_tasks(given: dict[str, Any]) -> None:
    items = [Demonstration("Why?", "So.", "No."), Demonstration("How?", "Thus.", "Never.")]
    for make in (functools.partial(EvaluationConfig, demonstrations=items), TuneConfig):
        with pytest.raises(SettingError, match=rf"{next(iter(given))} is .*, but it is for tasks, of which there are"):
            make(**given)
