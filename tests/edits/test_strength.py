from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

import sealign
from sealign.edits.strength import check_strength
from sealign.errors import SettingError


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1, 1.0),
        (0, 0.0),
        (-1.5, -1.5),
        ("0.5", 0.5),
        (" 2e-3 ", 0.002),
        (np.float32(0.5), 0.5),
        (torch.tensor(0.25), 0.25),
    ],
)
def test_numbers_and_their_texts(given: Any, expected: float) -> None:
    found = check_strength(given)
    assert type(found) is float
    assert found == expected


@pytest.mark.parametrize(("given", "shown"), [("high", "'high'"), ("", "''"), (None, "None"), ([1.0], r"\[1.0\]")])
def test_what_is_not_a_number_is_refused(given: Any, shown: str) -> None:
    with pytest.raises(SettingError, match=f"strength is {shown}, but it must be a number; try 0.5"):
        check_strength(given)


@pytest.mark.parametrize("given", [1000.5, -1001, 1e39, "-2e30", 10**31])
def test_it_must_not_be_absurd(given: Any, small_edit: sealign.Edit) -> None:
    shown = re.escape(f"{float(given):g}")
    message = rf"strength is {shown}, but it must be in \[-1000, 1000\]; try a value in \[0, 1\]"
    for set_strength in (
        check_strength,
        small_edit.with_strength,
        lambda value: sealign.MeanDifferenceConfig(strength=float(value)),
    ):
        with pytest.raises(SettingError, match=message):
            set_strength(given)


@pytest.mark.parametrize("strength", [1000.0, -1000.0])
@pytest.mark.parametrize("normalization", ["token", "none"])
def test_the_largest_strengths_compute(
    strength: float, normalization: Any, llama: Any, tokenizer: Any, small_edit: sealign.Edit
) -> None:
    ids = torch.tensor([tokenizer.encode("What is ice?")])
    with torch.no_grad(), sealign.apply_edit(llama, small_edit.with_normalization(normalization), strength=strength):
        assert llama(input_ids=ids).logits.shape[:2] == ids.shape


@pytest.mark.parametrize(
    ("given", "shown"),
    [(float("nan"), "nan"), ("inf", "inf"), (float("-inf"), "-inf"), ("1e999", "inf"), (10**400, "inf")],
)
def test_it_must_be_finite(given: Any, shown: str) -> None:
    with pytest.raises(SettingError, match=rf"strength is {shown}, but it must be finite; try a value in \[0, 1\]"):
        check_strength(given)
