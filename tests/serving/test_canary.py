"""The canary: what the hooks answer, and which answers of a server are accepted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sealign
from sealign.errors import ServingError
from sealign.serving import canary as module
from sealign.serving.canary import (
    COMPLETION,
    Canary,
    CanaryAnswer,
    check_canary,
    check_changes,
    fits_in_memory,
    hooks_canary,
)

IDS = [5, 9, 3, 7, 11, 4]


@pytest.fixture
def canary(llama: Any, small_edit: sealign.Edit) -> Canary:
    return hooks_canary(llama, IDS, [small_edit, small_edit.reversed()])


def moved(answer: CanaryAnswer, by: float, *, seed: int | None = None) -> CanaryAnswer:
    """The answer with each log-probability of the prompt moved, in a random direction if there is a seed."""
    signs = np.ones(len(answer.prompt)) if seed is None else np.random.default_rng(seed).normal(size=len(answer.prompt))
    return dataclasses.replace(answer, prompt=tuple(np.array(answer.prompt) + by * signs))


def test_the_hooks_answers_are_those_of_transformers(llama: Any, small_edit: sealign.Edit, canary: Canary) -> None:
    with sealign.apply_edit(llama, small_edit), torch.no_grad():
        ids = llama.generate(
            torch.tensor([IDS]),
            attention_mask=torch.ones(1, len(IDS), dtype=torch.long),
            max_new_tokens=COMPLETION,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0]
        logs = torch.log_softmax(llama(ids[None]).logits[0, :-1].double(), -1).gather(1, ids[1:, None])[:, 0]
    found = canary.edited[small_edit.hash]
    assert list(found.completion) == ids[len(IDS) :].tolist()
    np.testing.assert_allclose([*found.prompt, *found.greedy], logs.numpy(), atol=1e-5)
    assert len(found.prompt) == len(IDS) - 1
    assert found.distance(canary.plain) > 0.01
    assert canary.plain.distance(canary.plain) == 0


def test_it_passes_through_the_environment(canary: Canary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(module.CANARY_VARIABLE, raising=False)
    assert Canary.from_environment() is None
    for name, value in canary.to_environment().items():
        monkeypatch.setenv(name, value)
    assert Canary.from_environment() == canary


def test_an_exact_server_is_held_to_the_hooks(canary: Canary, small_edit: sealign.Edit) -> None:
    key, expected = small_edit.hash, canary.edited[small_edit.hash]
    assert check_canary("mild", canary.plain, expected, canary, key) == 0
    assert check_canary("mild", moved(canary.plain, 1e-4), moved(expected, 5e-4), canary, key) == pytest.approx(5e-4)
    close = dataclasses.replace(expected, completion=(expected.completion[0] + 1, *expected.completion[1:]))
    assert check_canary("mild", canary.plain, close, canary, key) == 0  # a close call, as probable as the other
    other = dataclasses.replace(close, greedy=(expected.greedy[0] - 0.1, *expected.greedy[1:]))
    for wrong in (
        canary.plain,
        canary.edited[small_edit.reversed().hash],
        moved(expected, 2e-3),
        moved(expected, float("nan")),
        other,
    ):
        with pytest.raises(ServingError, match="does not apply the edit 'mild' as the hooks do"):
            check_canary("mild", canary.plain, wrong, canary, key)


def test_a_rounded_server_is_held_to_the_change(canary: Canary, small_edit: sealign.Edit) -> None:
    """Its base model differs by more than an exact one, but by less than the edit changes."""
    key, expected = small_edit.hash, canary.edited[small_edit.hash]
    change = float(np.abs(np.array(expected.prompt) - np.array(canary.plain.prompt)).mean())
    noise = change / 8
    assert noise > module.COARSE
    plain = moved(canary.plain, noise, seed=0)
    check_canary("mild", plain, moved(expected, noise, seed=1), canary, key)
    for wrong in (
        plain,
        moved(canary.plain, noise, seed=2),
        moved(canary.edited[small_edit.reversed().hash], noise, seed=3),
        moved(expected, float("nan")),
    ):
        with pytest.raises(ServingError, match="does not apply the edit"):
            check_canary("mild", plain, wrong, canary, key)


def test_a_server_of_other_weights_is_held_to_a_change_alone(canary: Canary, small_edit: sealign.Edit) -> None:
    """As quantised ones, whose noise is as large as the edit."""
    plain = moved(canary.plain, 9.0, seed=4)
    check_canary("mild", plain, moved(plain, 0.01, seed=5), canary, small_edit.hash)
    with pytest.raises(ServingError, match="the edit 'mild' changes no output"):
        check_canary("mild", plain, plain, canary, small_edit.hash)


def test_an_edit_without_an_effect_by_the_hooks_is_no_fault_of_the_server(llama: Any, small_edit: sealign.Edit) -> None:
    weak = small_edit.with_strength(1e-9)
    canary = hooks_canary(llama, IDS, [weak])
    assert check_canary("weak", canary.plain, canary.plain, canary, weak.hash) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ServingError, match="changes no output"):
        check_changes("weak", canary.plain, canary.plain)


def test_only_models_that_fit_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "choose_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(module, "free_memory", lambda: 1000)
    assert not fits_in_memory(tmp_path, "auto")  # without files of a kind whose size is known
    (tmp_path / "model.safetensors").write_bytes(b"x" * 700)
    assert fits_in_memory(tmp_path, "auto")
    assert not fits_in_memory(tmp_path, "float32")
    monkeypatch.setattr(module, "free_memory", lambda: 870)
    assert not fits_in_memory(tmp_path, "auto")
