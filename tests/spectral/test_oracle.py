"""The whole of the method on tensors against float64 results computed from the formulas."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sealign import fit_projection
from tests.conftest import SHARED

FOLDER = Path(os.environ.get("SEALIGN_ORACLE_DIR", SHARED / "oracle"))
CASES: list[dict[str, Any]] = (
    json.loads((FOLDER / "index.json").read_text()) if (FOLDER / "index.json").is_file() else []
)

TOLERANCES = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-5, 1e-5)}
"""Relative tolerances of factors and of linear edits, by the type of the inputs."""

INVERSE_SLOPE = {"identity": 1.0, "squared_exponential": 1e2, "tanh": 1e2, "elu": 1e3}
"""How much an inverse magnifies rounding near the ends of its domain, where its slope is up to 1 / eps."""


@pytest.mark.skipif(not CASES, reason=f"no oracle cases at {FOLDER}; set SEALIGN_ORACLE_DIR")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=[case["case"] for case in CASES])
def test_case(case: dict[str, Any], dtype: torch.dtype) -> None:
    arrays = dict(np.load(FOLDER / f"{case['case']}.npz"))
    inputs = {name: torch.tensor(array).to(dtype) for name, array in arrays.items()}
    projection = fit_projection(
        inputs["neutral"],
        inputs["positive"],
        inputs["negative"],
        explained_variance=case["explained_variance"],
        centered=case["centered"],
        feature_map=case["feature_map"],
    )
    assert projection.rank_positive == case["rank_positive"]
    assert projection.rank_negative == case["rank_negative"]

    factor, linear = TOLERANCES[dtype]

    def close(actual: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(actual.double().numpy(), expected, rtol=0, atol=tolerance * scale)

    for side, name in (("positive", "projector_positive"), ("negative", "projector_negative_removed")):
        values = getattr(projection, f"singular_values_{side}")
        known = arrays[f"singular_values_{side}"][: len(values)]
        assert len(values) >= getattr(projection, f"rank_{side}")
        close(values, known, factor)
        vectors = getattr(projection, side)
        close(vectors @ vectors.T, arrays[name], factor)
    edited = projection(
        inputs["tokens"],
        combine=case["combine"],
        normalization=case["normalization"],
        strength=case["strength"],
    )
    assert edited.dtype == dtype
    close(edited, arrays["edited"], linear * INVERSE_SLOPE[case["feature_map"]])
