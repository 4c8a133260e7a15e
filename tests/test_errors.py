from __future__ import annotations

import inspect

import pytest

from sealign import errors
from sealign.errors import SealignError, SettingError, check_choice, first_sentence, suggestion, unknown_name


def test_all_errors_have_one_base_and_are_documented() -> None:
    classes = [
        value for value in vars(errors).values() if inspect.isclass(value) and value.__module__ == errors.__name__
    ]
    assert len(classes) > 5
    for cls in classes:
        assert issubclass(cls, SealignError | UserWarning)
        assert cls.__doc__


def test_suggestion_only_for_near_names() -> None:
    assert suggestion("squared_exponentail", ["tanh", "squared_exponential"]) == (
        " (did you mean 'squared_exponential'?)"
    )
    assert suggestion("zzz", ["tanh"]) == ""


def test_unknown_name_lists_the_choices() -> None:
    assert unknown_name("site", "mpl", ["mlp", "residual"]) == (
        "unknown site 'mpl' (did you mean 'mlp'?); choose one of: mlp, residual"
    )


def test_check_choice() -> None:
    check_choice("site", "mlp", ["mlp", "residual"])
    with pytest.raises(
        SettingError, match=r"^unknown site 'mpl' \(did you mean 'mlp'\?\); choose one of: mlp, residual$"
    ):
        check_choice("site", "mpl", iter(["mlp", "residual"]))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("One.\n  Two. Three.", "One"), ("", "ValueError"), ("No stop:", "No stop"), ("x" * 400, "x" * 300)],
)
def test_first_sentence(text: str, sentence: str) -> None:
    assert first_sentence(ValueError(text)) == sentence
