"""The difference operator against its formula in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import sealign
from sealign.demonstrations.demonstration import Demonstration
from sealign.edits.attach import apply_edit
from sealign.errors import ActivationError, DegenerateError
from sealign.fitting.activations import Activations
from sealign.fitting.layer_statistics import LayerStatistics
from sealign.methods.registry import fit_edit, fit_edit_from_activations
from tests.methods.residuals import stream


def _formula(rows: Activations, layer: int, rank: int) -> np.ndarray:
    """V_k (S_k / S_1) U_k^T of H^T (H+ - H-) / n, (d, d) float64."""
    neutral, positive, negative = (matrix.double().numpy() for matrix in rows.rows(layer))
    u, s, vt = np.linalg.svd(neutral.T @ (positive - negative) / len(neutral))
    found: np.ndarray = vt[:rank].T @ np.diag(s[:rank] / s[0]) @ u[:, :rank].T
    return found


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("site", ["mlp", "attention", "residual"])
def test_it_is_the_leading_part_of_the_difference(
    site: Any, rank: int, llama: Any, tokenizer: Any, demonstrations: list[Demonstration]
) -> None:
    config = sealign.DifferenceOperatorConfig(site=site, layers="1,2", rank=rank, strength=0.4)
    rows = sealign.collect_activations(llama, tokenizer, demonstrations, site=site, config=config.collect_config())
    edit: Any = fit_edit(llama, tokenizer, demonstrations, config=config)
    tokens = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))
    for layer in (1, 2):
        expected = tokens.double() + 0.4 * tokens.double() @ torch.from_numpy(_formula(rows, layer, rank)).T
        found = edit.layer_edits[layer](tokens, 0.4)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
        assert edit.affine_edits[layer].constant_part() is None
        assert edit.record.layers[str(layer)].rank == rank


def test_the_stream_changes_by_it(llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    config = sealign.DifferenceOperatorConfig(layers=[1], strength=-0.7)
    edit = fit_edit(llama, tokenizer, demonstrations, config=config)
    rows = sealign.collect_activations(
        llama, tokenizer, demonstrations, site="residual", layers=[1], config=config.collect_config()
    )
    ids = tokenizer.encode("The clerk asks for a form.")
    before = stream(llama, ids, 1)
    with apply_edit(llama, edit):
        after = stream(llama, ids, 1)
    expected = -0.7 * before @ torch.from_numpy(_formula(rows, 1, 1)).T
    torch.testing.assert_close(after - before, expected, rtol=1e-3, atol=1e-5)


def test_what_both_sides_share_cancels() -> None:
    """A common part of 2^10 in both completions leaves the direction of their difference as it is."""
    generator = torch.Generator().manual_seed(0)
    neutral, difference, common = (torch.randint(-4, 5, (7, 6), generator=generator).float() for _ in range(3))
    plain, shifted = LayerStatistics(6), LayerStatistics(6)
    plain.update(neutral, difference, torch.zeros(7, 6))
    shifted.update(neutral, 1024 * common + difference, 1024 * common)
    first, second = (each.positive.difference(each.negative).matrix for each in (plain, shifted))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-9)


@pytest.mark.parametrize("count", [3, 11])  # fewer rows than features, and more: rows are stored, or their products
@pytest.mark.parametrize("centered", [False, True])
def test_rows_and_products_give_one_difference(count: int, centered: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randn(count, 5, generator=generator) for _ in range(3)]
    statistics = LayerStatistics(5, centered=centered)
    statistics.update(*rows)
    h, plus, minus = (matrix.double() - (matrix.double().mean(0) if centered else 0) for matrix in rows)
    expected = h.T @ (plus - minus) / count
    torch.testing.assert_close(statistics.positive.difference(statistics.negative).matrix, expected)


def test_sides_of_other_demonstrations_are_refused() -> None:
    first, second = LayerStatistics(4), LayerStatistics(4)
    first.update(*torch.ones(3, 2, 4))
    second.update(*torch.ones(3, 3, 4))
    with pytest.raises(ActivationError, match=r"\(4, False, 2\) and \(4, False, 3\)"):
        first.positive.difference(second.negative)


def test_equal_sides_have_no_difference(llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    rows = sealign.collect_activations(llama, tokenizer, demonstrations, site="residual", layers=[2])
    same = Activations("residual", rows.neutral, rows.positive, rows.positive)
    with pytest.raises(DegenerateError, match="layer 2: .*zero"):
        fit_edit_from_activations(
            llama, tokenizer, same, demonstrations, config=sealign.DifferenceOperatorConfig(layers=[2])
        )
