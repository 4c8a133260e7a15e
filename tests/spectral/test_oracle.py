"""The whole of the method on tensors against float64 results computed from the formulas."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from sealign.fitting.layer_statistics import LayerStatistics
from sealign.methods.sea import SEAConfig, decompose, fit_projection, projection_edit
from tests import oracle
from tests.conftest import SHARED

FOLDER = Path(os.environ.get("SEALIGN_ORACLE_DIR", SHARED / "oracle"))
"""More cases, in the format that ``tests/oracle.py`` writes."""

STORED = list(oracle.read_cases(FOLDER))

TOLERANCES = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-5, 1e-5)}
"""Relative tolerances of factors and of linear edits, by the type of the inputs."""

INVERSE_SLOPE = {"identity": 1.0, "squared_exponential": 1e2, "tanh": 1e2, "elu": 1e3}
"""How much an inverse magnifies rounding near the ends of its domain, where its slope is up to 1 / eps."""

both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def check(case: dict[str, Any], arrays: dict[str, npt.NDArray[np.float64]], dtype: torch.dtype) -> None:
    inputs = {name: torch.tensor(array).to(dtype) for name, array in arrays.items()}
    matrices = inputs["neutral"], inputs["positive"], inputs["negative"]
    settings = {name: case[name] for name in ("explained_variance", "centered", "feature_map")}
    projection = fit_projection(*matrices, **settings)
    assert projection.rank_positive == case["rank_positive"]
    assert projection.rank_negative == case["rank_negative"]

    factor, linear = TOLERANCES[dtype]

    def close(actual: torch.Tensor, expected: npt.NDArray[np.float64], tolerance: float) -> None:
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(actual.double().numpy(), expected, rtol=0, atol=tolerance * scale)

    statistics = LayerStatistics(matrices[0].shape[1], centered=case["centered"], feature_map=case["feature_map"])
    statistics.update(*matrices)
    _, *spectra = decompose(statistics, SEAConfig(**settings))
    sides = (("positive", "projector_positive"), ("negative", "projector_negative_removed"))
    for (side, name), spectrum in zip(sides, spectra, strict=True):
        known = arrays[f"singular_values_{side}"]
        assert len(spectrum.values) >= case[f"rank_{side}"]
        close(spectrum.values, known[: len(spectrum.values)], factor)
        assert spectrum.energy == pytest.approx(float(np.square(known).sum()), rel=factor)
        vectors = getattr(projection, side)
        close(vectors @ vectors.T, arrays[name], factor)
    edited = projection(
        inputs["tokens"],
        combine=case["combine"],
        normalization=case["normalization"],
        strength=case["strength"],
    )
    layer = projection_edit(projection, combine=case["combine"], normalization=case["normalization"])
    for found in (edited, layer(inputs["tokens"], case["strength"])):
        assert found.dtype == dtype
        close(found, arrays["edited"], linear * INVERSE_SLOPE[case["feature_map"]])


@both_dtypes
@pytest.mark.parametrize("settings", oracle.settings(), ids=lambda settings: settings.case)
def test_generated_case(settings: oracle.Settings, dtype: torch.dtype) -> None:
    case = oracle.make_case(settings)
    check(case.record(), case.arrays, dtype)


@pytest.mark.skipif(not STORED, reason=f"no stored cases at {FOLDER}; set SEALIGN_ORACLE_DIR")
@both_dtypes
@pytest.mark.parametrize(("case", "file"), STORED, ids=[case["case"] for case, _ in STORED])
def test_stored_case(case: dict[str, Any], file: Path, dtype: torch.dtype) -> None:
    check(case, dict(np.load(file)), dtype)


def test_a_written_case_is_read_as_a_stored_one(tmp_path: Path) -> None:
    oracle.write_cases(tmp_path)
    stored = list(oracle.read_cases(tmp_path))
    assert len(stored) == len(oracle.settings())
    case, file = stored[-1]
    check(case, dict(np.load(file)), torch.float64)
