"""Settings of methods from text, as a command line gives them."""

from __future__ import annotations

from typing import Any

import pytest

import sealign
from sealign.errors import SettingError
from sealign.methods.parse_settings import parse_settings, parse_value
from sealign.methods.registry import get_method


def configured(name: str, given: dict[str, str]) -> Any:
    return get_method(name).config(**parse_settings(name, given))


def test_texts_become_values() -> None:
    assert configured("icd", {"training.rank": "3", "induce": "lora"}).training.rank == 3
    assert configured("iti", {"heads": "5", "direction": "probe"}) == sealign.ITIConfig(heads=5, direction="probe")
    assert configured("sea", {"rank": "3,2", "centered": "true", "layers": "1,-1"}) == sealign.SEAConfig(
        rank=(3, 2), centered=True, layers="1,-1"
    )
    assert configured("sea", {"explained_variance": "0.9"}).explained_variance == 0.9
    assert configured("sea", {"explained_variance": "1"}).explained_variance == 1
    assert configured("mean_difference", {"strength": "2", "layers": "3"}).strength == 2.0
    assert configured("icl", {"instruction": "3"}).instruction == "3"
    assert configured("leace", {"prompt_format.style": "plain"}).prompt_format == sealign.PromptFormat("plain")


@pytest.mark.parametrize(
    ("name", "given", "complaint"),
    [
        ("itti", {}, "did you mean 'iti'"),
        ("iti", {"head": "3"}, "did you mean 'heads'"),
        ("iti", {"heads": "many"}, "iti's heads is 'many', but it must be an integer"),
        ("iti", {"heads": "0"}, "at least 1"),
        ("iti", {"alpha": "many"}, "iti's alpha is 'many', but it must be a number"),
        ("iti", {"validation": "1"}, r"in \(0, 1\)"),
        ("iti", {"direction": "up"}, "mass_mean, probe"),
        ("icd", {"training": "3"}, "training"),
        ("icd", {"training.rnk": "3"}, r"unknown setting of icd 'training.rnk'"),
        ("icd", {"induce": "drugs"}, "lora, prompt"),
        ("icd", {"prompt": " ", "induce": "prompt"}, "is empty"),
        ("cd", {}, "contrastive decoding needs one"),
        ("dola", {"bucket": "middle"}, "high, low"),
        ("dola", {"plausibility": "2"}, r"in \[0, 1\]"),
        ("best_of_n", {"temperature": "0"}, "above 0"),
        ("best_of_n", {"top_p": "0"}, r"in \(0, 1\]"),
        ("lora_ft", {"epochs": "0"}, "above 0"),
        ("icl", {"shots": "0"}, "at least 1"),
        ("icl", {"shots": "2.5"}, "must be an integer"),
        ("mean_difference", {"strength": "inf"}, "finite"),
        ("leace", {"layers": "signature:3"}, "signature"),
        ("sea", {"centered": "perhaps"}, "sea's centered is 'perhaps', but it must be true or false"),
        ("sea", {"rank": "1,2,3"}, "rank"),
        ("sea", {"prompt_format.styl": "plain"}, "did you mean 'style'|unknown setting of sea"),
    ],
)
def test_texts_that_are_refused(name: str, given: dict[str, str], complaint: str) -> None:
    with pytest.raises(SettingError, match=complaint):
        configured(name, given)


def test_values() -> None:
    assert parse_value("true", bool, "x") is True
    assert parse_value("3", int | None, "x") == 3
    assert parse_value("0.5, 0.25", float | tuple[float, float], "x") == (0.5, 0.25)
    assert parse_value("3", str, "x") == "3"
