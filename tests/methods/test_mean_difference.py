"""Mean-difference steering against its formula in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import sealign
from sealign.demonstrations.demonstration import Demonstration
from sealign.edits.attach import apply_edit
from sealign.errors import SettingError
from sealign.fitting.activations import Activations
from sealign.methods.registry import fit_edit, fit_edit_from_activations
from tests.methods.residuals import residuals, stream


def test_it_is_the_mean_difference(
    fitted: Callable[[str], Any], llama: Any, tokenizer: Any, demonstrations: list[Demonstration]
) -> None:
    """Read without the library's hooks, and applied to a text of which it has seen nothing."""
    edit = fitted("mean_difference")
    positive, negative = residuals(llama, tokenizer, demonstrations, 1)
    expected = (positive - negative).mean(0)
    assert np.allclose(edit.affine_edits[1].shift.numpy(), expected, atol=1e-5)
    assert edit.rank == 0
    assert edit.record.layers["1"].statistics["shift_norm"] == pytest.approx(np.linalg.norm(expected), rel=1e-5)
    ids = tokenizer.encode("The clerk asks for a form.")
    before = stream(llama, ids, 1)
    with apply_edit(llama, edit):
        after = stream(llama, ids, 1)
    assert torch.allclose(after - before, torch.from_numpy(2.0 * expected).expand_as(after), atol=1e-4)


@pytest.mark.parametrize("token", ["last", "mean"])
@pytest.mark.parametrize("site", ["mlp", "attention", "residual"])
def test_against_float64_at_every_site(
    site: Any, token: Any, llama: Any, tokenizer: Any, demonstrations: list[Demonstration]
) -> None:
    config = sealign.MeanDifferenceConfig(site=site, layers="all", token=token)
    rows = sealign.collect_activations(llama, tokenizer, demonstrations, site=site, config=config.collect_config())
    edit: Any = fit_edit(llama, tokenizer, demonstrations, config=config)
    assert edit.layers == [0, 1, 2, 3]
    for layer in edit.layers:
        difference = rows.positive[layer].numpy().astype(np.float64) - rows.negative[layer].numpy()
        shift = edit.affine_edits[layer].shift
        assert shift is not None
        np.testing.assert_allclose(shift.numpy(), difference.mean(0), rtol=0, atol=1e-6)


def test_large_common_parts_cancel(llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    """Means are taken in float64: a part of 2^12 that both sides share leaves the difference of 1/8 exact."""
    generator = torch.Generator().manual_seed(0)
    common = 4096 + torch.randint(0, 8, (7, 48), generator=generator).float()
    small = torch.randint(0, 8, (7, 48), generator=generator).float() / 64
    rows = Activations("residual", {2: common}, {2: common + small}, {2: common - small})
    config = sealign.MeanDifferenceConfig(layers=[2])
    edit: Any = fit_edit_from_activations(llama, tokenizer, rows, demonstrations, config=config)
    expected = (2 * small.double()).mean(0).float()
    shift = edit.affine_edits[2].shift
    assert shift is not None
    assert torch.equal(shift, expected)


def test_defaults_are_the_papers() -> None:
    config = sealign.MeanDifferenceConfig()
    assert (config.site, config.layers, config.normalization, config.strength) == ("residual", "at:13/32", "none", 1.0)
    assert config.read_site == "residual"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": float("inf")}, "strength is inf, but it must be finite"),
        ({"multiplier": 2.0}, "unknown MeanDifferenceConfig setting 'multiplier'"),
        ({"normalization": "tokens"}, "unknown normalization 'tokens' (did you mean 'token'?)"),
        ({"layer": 3}, "unknown MeanDifferenceConfig setting 'layer' (did you mean 'layers'?)"),
    ],
)
def test_settings_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=re.escape(message)):
        sealign.MeanDifferenceConfig(**change)
