"""The targeted shift against its formula in float64, and what it does to ordinary text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import sealign
from sealign.demonstrations.bundled import ordinary_texts
from sealign.demonstrations.demonstration import Demonstration
from sealign.edits.attach import apply_edit
from sealign.errors import DegenerateError, SettingError
from sealign.fitting.activation_store import Keep
from sealign.fitting.activations import Activations
from sealign.methods.registry import fit_edit, fit_edit_from_activations
from sealign.spectral.reading_direction import reading_direction
from tests.methods.residuals import stream


def _minimum(sides: np.ndarray, ordinary: np.ndarray) -> np.ndarray:
    """The direction from the normal equations, scaled to a mean response of 1."""
    count, width = sides.shape
    second = sides.T @ sides / count + ordinary.T @ ordinary / len(ordinary)
    ridge = 0.1 * np.mean(sides**2)
    found: np.ndarray = np.linalg.inv(second + ridge * np.eye(width)) @ sides.mean(0)
    return found / (found @ sides.mean(0))


@pytest.mark.parametrize(("count", "texts"), [(4, 5), (9, 40)])  # fewer rows than features, and more
def test_direction_against_the_normal_equations(count: int, texts: int) -> None:
    generator = np.random.default_rng(0)
    sides, ordinary = generator.normal(0.5, 1, (count, 14)), generator.normal(size=(texts, 14))
    found = reading_direction(torch.from_numpy(sides), torch.from_numpy(ordinary)).numpy()
    np.testing.assert_allclose(found, _minimum(sides, ordinary), rtol=1e-9, atol=1e-12)


def test_direction_minimises_the_stated_sum() -> None:
    """No direction near it, up to its scale, has a smaller sum."""
    generator = np.random.default_rng(1)
    sides, ordinary = generator.normal(0.5, 1, (7, 6)), generator.normal(size=(11, 6))
    found = reading_direction(torch.from_numpy(sides), torch.from_numpy(ordinary)).numpy()

    def least(r: np.ndarray) -> float:
        """The sum for the best multiple of a direction."""
        a, b = sides @ r, ordinary @ r
        square = np.mean(a**2) + np.mean(b**2) + 0.1 * np.mean(sides**2) * (r @ r)
        return float(1 - np.mean(a) ** 2 / square)

    assert all(least(found) < least(found + 1e-3 * step) for step in generator.normal(size=(50, 6)))


def test_a_direction_of_ordinary_text_is_hardly_read() -> None:
    """Demonstrations and text share a large first feature; the second is the demonstrations' own."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(60, 5, generator=generator)
    sides = 0.1 * noise[:20] + torch.tensor([8.0, 3.0, 0, 0, 0])
    ordinary = 0.1 * noise[20:] + torch.tensor([8.0, 0, 0, 0, 0])
    read = reading_direction(sides, ordinary)
    assert float((sides.double() @ read).mean()) == pytest.approx(1)
    assert float((ordinary.double() @ read).abs().mean()) < 0.25
    assert float((ordinary.double() @ sides.double().mean(0)).mean() / sides.double().mean(0).square().sum()) > 0.8


def test_a_direction_needs_a_mean() -> None:
    with pytest.raises(DegenerateError, match="mean activation of the completions is zero"):
        reading_direction(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]), torch.ones(3, 2))


@torch.no_grad()
def _ordinary(model: Any, tokenizer: Any, layer: int) -> np.ndarray:
    """The residual stream of all tokens of the ordinary text, one text at a time."""
    return torch.cat([stream(model, list(tokenizer.encode(text)), layer) for text in ordinary_texts()]).numpy()


def test_the_edit_is_the_formula(llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    config = sealign.TargetedShiftConfig(layers=[1, 2], strength=0.6)
    rows = sealign.collect_activations(
        llama, tokenizer, demonstrations, site="residual", config=config.collect_config()
    )
    edit: Any = fit_edit(llama, tokenizer, demonstrations, config=config)
    tokens = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))
    for layer in (1, 2):
        positive, negative = (side[layer].double().numpy() for side in (rows.positive, rows.negative))
        ordinary = _ordinary(llama, tokenizer, layer)
        read = _minimum(np.concatenate([positive, negative]), ordinary)
        difference = (positive - negative).mean(0)
        expected = tokens.double().numpy() + 0.6 * np.outer(tokens.double().numpy() @ read, difference)
        np.testing.assert_allclose(edit.layer_edits[layer](tokens, 0.6), expected, rtol=1e-4, atol=1e-5)
        figures = edit.record.layers[str(layer)].statistics
        assert figures["response_to_text"] == pytest.approx(np.sqrt(np.mean((ordinary @ read) ** 2)), rel=1e-4)
        assert figures["shift_norm"] == pytest.approx(np.linalg.norm(difference), rel=1e-4)
        assert edit.affine_edits[layer].constant_part() is None


@pytest.mark.parametrize("site", ["mlp", "attention"])
def test_the_outputs_change_by_it(site: Any, llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    edit: Any = fit_edit(llama, tokenizer, demonstrations, config=sealign.TargetedShiftConfig(site=site, layers=[3]))
    module, outputs = llama.get_submodule(edit.modules[0]), []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output)[0].double())

    ids = torch.tensor([tokenizer.encode("The clerk asks for a form.")])
    with torch.no_grad():
        for strength in (0.0, -0.7):
            with apply_edit(llama, edit, strength=strength):
                hook = module.register_forward_hook(keep)
                llama(input_ids=ids)
                hook.remove()
    before, after = outputs
    left, right = (factor.double() for factor in (edit.affine_edits[3].left, edit.affine_edits[3].right))
    torch.testing.assert_close(after - before, -0.7 * before @ right.T @ left.T, rtol=1e-3, atol=1e-6)


def test_equal_sides_have_no_difference(llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    rows = sealign.collect_activations(llama, tokenizer, demonstrations, site="residual", layers=[2])
    same = Activations("residual", rows.neutral, rows.positive, rows.positive)
    config = sealign.TargetedShiftConfig(layers=[2])
    with pytest.raises(DegenerateError, match="layer 2: positives and negatives have the same mean"):
        fit_edit_from_activations(llama, tokenizer, same, demonstrations, config=config)


def test_sums_are_refused(llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    config = sealign.TargetedShiftConfig(layers=[2])
    with pytest.raises(SettingError, match=r"TargetedShiftConfig needs rows; pass keep=Keep\('rows'\)"):
        fit_edit(llama, tokenizer, demonstrations, config=config, keep=Keep("sums", "memory"))
