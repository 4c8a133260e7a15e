"""How far what SEA keeps and what it drops cancel, against numpy, and the warning if little is left."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

import sealign
from sealign.edits.record import EditRecord
from sealign.fitting.activations import Activations
from sealign.methods.cancellation import cancellation_warning
from sealign.methods.registry import fit_edit_from_activations
from sealign.methods.sea import SEAConfig


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("feature_map", ["identity", "tanh"])
def test_how_far_keep_and_drop_cancel(llama: Any, tokenizer: Any, feature_map: Any, centered: bool) -> None:
    width = llama.config.hidden_size
    demonstrations = [sealign.Demonstration(f"prompt {i}", "yes", "no") for i in range(9)]
    h, noise, other = (torch.randn(9, width, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3))
    activations = Activations("mlp", {2: h}, {2: h + noise}, {2: h + 2 * other})
    config = SEAConfig(layers=[2], rank=(4, 3), centered=centered, feature_map=feature_map)

    def fit(**changes: Any) -> dict[str, float]:
        changed = config.replace(**changes)
        fitted = fit_edit_from_activations(llama, tokenizer, activations, demonstrations, config=changed)
        return fitted.record.layers["2"].statistics

    features = [rows.double().numpy() for rows in (h, h + noise, h + 2 * other)]
    features = [np.tanh(rows) for rows in features] if feature_map == "tanh" else features
    features = [rows - rows.mean(0) for rows in features] if centered else features
    z = features[0]
    plus, minus = (np.linalg.svd(z.T @ rows)[0][:, :k] for rows, k in zip(features[1:], (4, 3), strict=True))
    cosines = np.linalg.svd(plus.T @ minus)[1]
    kept, dropped = z @ (plus @ plus.T), z @ (minus @ minus.T)
    lengths = [sum(np.linalg.norm(row) for row in rows) for rows in (kept - dropped, kept, dropped)]
    expected = {"overlap": np.mean(cosines**2), "net_share": lengths[0] / (lengths[1] + lengths[2])}
    assert 0.05 < expected["overlap"] < 0.99
    for combine in ("both", "reversed", "average"):
        found = fit(combine=combine)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    for combine in ("positive", "negative"):
        assert not fit(combine=combine).keys() & expected.keys()


def test_the_warning_of_an_edit_that_nearly_cancels(small_edit: sealign.Edit) -> None:
    def record(**shares: float) -> EditRecord:
        layers = {
            name: dataclasses.replace(entry, statistics={"signature": 1.0} | {"net_share": shares[f"layer{name}"]})
            for name, entry in small_edit.record.layers.items()
        }
        return dataclasses.replace(small_edit.record, layers=layers)

    assert cancellation_warning(record(layer1=0.05, layer3=1.0)) == ""
    assert cancellation_warning(record(layer1=0.04, layer3=0.03125)).startswith(
        "What the edit keeps and what it drops nearly cancel at 2 of 2 layers: the net share is 0.031 at layer 3, "
        "below 0.05; fit it centered"
    )
    one = cancellation_warning(record(layer1=0.02, layer3=0.5))
    assert "at 1 of 2 layers: the net share is 0.020 at layer 1" in one
    without = {name: dataclasses.replace(entry, statistics={}) for name, entry in small_edit.record.layers.items()}
    assert cancellation_warning(dataclasses.replace(small_edit.record, layers=without)) == ""
    acting = dataclasses.replace(record(layer1=0.02, layer3=0.5), config=small_edit.record.config | {"shift": True})
    assert cancellation_warning(acting) == ""
