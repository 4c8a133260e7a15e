"""The effect of leaving out an edit's rescaling."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sealign
from sealign.errors import FingerprintError
from sealign.export.deviation import Deviation, measure_deviation
from tests.export.made_edits import random_edit
from tests.tiny_models import build_model

PROMPTS = ["The town lies by the river.", "Bread is baked, and then sold.", "Ask the clerk at the counter:"]


@torch.no_grad()
def test_deviation_of_leaving_out_the_rescaling(llama: Any, tokenizer: Any, small_edit: sealign.Edit) -> None:
    found = measure_deviation(llama, tokenizer, small_edit, PROMPTS)
    divergences, same = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        logs = []
        for normalization in ("token", "none"):
            with sealign.apply_edit(llama, small_edit.with_normalization(normalization)):  # type: ignore[arg-type]
                logs.append(torch.log_softmax(llama(ids).logits[0].double(), -1))
        kl = torch.nn.functional.kl_div(logs[1], logs[0], log_target=True, reduction="none").sum(-1)
        divergences += kl.tolist()
        same += (logs[0].argmax(-1) == logs[1].argmax(-1)).tolist()
    assert found.mean_divergence == pytest.approx(np.mean(divergences), rel=1e-6)
    assert found.largest_divergence == pytest.approx(max(divergences), rel=1e-6)
    assert found.same_top == pytest.approx(np.mean(same))
    linear = measure_deviation(llama, tokenizer, small_edit.with_normalization("none"), PROMPTS)
    assert linear.largest_divergence == pytest.approx(0, abs=1e-12)
    assert linear.same_top == 1.0


def test_a_model_of_another_fingerprint(llama: Any, tokenizer: Any) -> None:
    edit = random_edit(llama, tokenizer, normalization="token")
    other = build_model("llama", vocab_size=len(tokenizer), intermediate_size=96)
    with pytest.raises(FingerprintError):
        measure_deviation(other, tokenizer, edit, PROMPTS)
    assert measure_deviation(other, tokenizer, edit, PROMPTS, ignore_mismatch=True).mean_divergence > 0


def test_the_file_beside_an_export(tmp_path: Path) -> None:
    deviation = Deviation(0.1, 0.5, 0.75)
    deviation.save(tmp_path)
    found = json.loads((tmp_path / "deviation.json").read_text())
    assert found == dataclasses.asdict(deviation) | {"broken": False}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_edit_is_said_to_be_broken(tmp_path: Path, value: float) -> None:
    Deviation(value, value, 0.5).save(tmp_path)
    found = json.loads((tmp_path / "deviation.json").read_text(), parse_constant=pytest.fail)
    assert found == {"mean_divergence": None, "largest_divergence": None, "same_top": 0.5, "broken": True}


def test_a_model_that_gives_nan(llama: Any, tokenizer: Any, small_edit: sealign.Edit) -> None:
    assert not measure_deviation(llama, tokenizer, small_edit, PROMPTS).broken
    model = build_model("llama", vocab_size=len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    assert measure_deviation(model, tokenizer, small_edit, PROMPTS, ignore_mismatch=True).broken
