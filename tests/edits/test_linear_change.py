"""A linear edit as a change of low rank, against the projection in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sealign.edits.linear_change import linear_change
from sealign.edits.record import EditSettings
from sealign.spectral.projection import COMBINES, Projection

D = 7


def _projection(mean: bool) -> Projection:
    generator = torch.Generator().manual_seed(3)
    bases = [torch.linalg.qr(torch.randn(D, k, dtype=torch.float64, generator=generator))[0] for k in (3, 2)]
    values = torch.ones(3, dtype=torch.float64)
    middle = torch.randn(D, dtype=torch.float64, generator=generator) if mean else None
    return Projection(bases[0], bases[1], middle, "identity", values, values[:2], 3.0, 2.0)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("mean", [False, True])
def test_the_change_is_what_the_projection_does(combine: Any, mean: bool) -> None:
    projection, tokens = _projection(mean), torch.randn(5, D, dtype=torch.float64)
    change = linear_change(projection, EditSettings("mlp", combine, "none", 0.3, "identity", mean))
    expected = projection(tokens, combine=combine, normalization="none", strength=0.3)
    found = tokens.T + change(tokens.T)
    if change.shift is not None:
        found = found + change.shift[:, None]
    torch.testing.assert_close(found.T, expected)
    assert (change.shift is None) is not mean
    ranks = {"both": 5, "reversed": 5, "average": 5, "positive": 3, "negative": 2}
    assert change.rank == ranks[combine]
    assert (change.scale == 0) is (combine in ("both", "reversed", "negative"))
