"""Fitted gates, on a behaviour planted in a tiny model: less damage at the same gain, and honest shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sealign
from sealign.demonstrations.bundled import neutral_texts, ordinary_texts
from sealign.errors import SettingError
from sealign.evaluation.damage import measure_damage
from sealign.evaluation.preference import preference_scores
from sealign.fitting.token_activations import collect_token_activations
from sealign.models.passages import completion_passages, text_passages
from sealign.models.sites import resolve_sites
from sealign.spectral.reading_direction import reading_direction
from tests.evaluation.planted import planted_demonstrations, planted_model

SHARE = 0.1


@pytest.fixture(scope="module")
def planted(tokenizer: Any) -> Any:
    return planted_model(len(tokenizer))


def _config(gate: float | None) -> sealign.MeanDifferenceConfig:
    return sealign.MeanDifferenceConfig(site="residual", layers=(1, 2), strength=0.7, gate=gate, batch_size=4)


@pytest.fixture(scope="module")
def edits(planted: Any, tokenizer: Any) -> tuple[sealign.Edit, sealign.Edit]:
    """An edit without a gate and with one, of the same demonstrations."""
    items = planted_demonstrations(24)
    made = [sealign.fit_edit(planted, tokenizer, items, config=_config(gate)) for gate in (None, SHARE)]
    assert all(isinstance(edit, sealign.Edit) for edit in made)
    return made[0], made[1]  # type: ignore[return-value]


def _gain(model: Any, tokenizer: Any, edit: sealign.Edit) -> float:
    """The increase of the preference margin on demonstrations that the edit was not fitted on."""
    items = planted_demonstrations(16, seed=5)
    base = preference_scores(model, tokenizer, items)["preference_margin"].value
    with sealign.apply_edit(model, edit):
        return preference_scores(model, tokenizer, items)["preference_margin"].value - base


def test_damage_falls_and_the_gain_stays(
    planted: Any, tokenizer: Any, edits: tuple[sealign.Edit, sealign.Edit]
) -> None:
    plain, gated = edits
    for layer in plain.layers:
        for name, tensor in plain.layer_edits[layer].tensors().items():
            assert torch.equal(tensor, gated.layer_edits[layer].tensors()[name])
    gains = [_gain(planted, tokenizer, edit) for edit in edits]
    assert gains[0] > 0.05
    assert gains[1] > 0.8 * gains[0]
    texts = neutral_texts()[:8]
    damages = [measure_damage(planted, tokenizer, edit, texts=texts).mean_divergence for edit in edits]
    assert damages[0] > 1e-3
    assert damages[1] < 0.4 * damages[0]


def test_probe_threshold_and_shares(planted: Any, tokenizer: Any, edits: tuple[sealign.Edit, sealign.Edit]) -> None:
    """Computed again from the activations at the site, in float64."""
    gated, items, texts = edits[1], planted_demonstrations(24), neutral_texts()
    sites = resolve_sites(planted, "residual", [1, 2])

    def read(passages: Any) -> dict[int, torch.Tensor]:
        found = collect_token_activations(planted, tokenizer, passages, sites)
        return {layer: rows.double() for layer, rows in found.items()}

    halves = [
        read([passage for pair in completion_passages(tokenizer, part) for passage in pair])
        for part in (items[::2], items[1::2])
    ]
    ordinary, neutral, other = (
        read(text_passages(tokenizer, part)) for part in (ordinary_texts(), texts[::2], texts[1::2])
    )
    for layer in (1, 2):
        gate = gated.layer_edits[layer].gate
        assert gate is not None
        expected = reading_direction(halves[0][layer], ordinary[layer])
        torch.testing.assert_close(gate.probe.double(), expected / expected.norm(), rtol=1e-4, atol=1e-5)
        count = len(neutral[layer])
        share = float(gate.is_open(neutral[layer].float()).double().mean())
        assert SHARE - 1.5 / count <= share <= SHARE, "of the half that sets the threshold, at most the share"
        stated = gated.record.layers[str(layer)].statistics
        for name, rows in (("gate_neutral_share", other), ("gate_demonstration_share", halves[1])):
            found = float((rows[layer] @ gate.probe.double() > gate.threshold).double().mean())
            assert stated[name] == pytest.approx(found, abs=2 / len(rows[layer]))
        assert stated["gate_demonstration_share"] > 0.7
        assert stated["gate_neutral_share"] < 2 * SHARE


@pytest.mark.parametrize(
    "config",
    [
        sealign.SEAConfig(layers=(1, 3), feature_map="tanh", explained_variance=0.9, gate=0.3, batch_size=4),
        sealign.LEACEConfig(site="attention", layers=(2,), gate=0.3, batch_size=4),
        sealign.ITIConfig(heads=3, alpha=5.0, gate=0.3, batch_size=4),
        sealign.TargetedShiftConfig(site="mlp", layers=(2,), gate=0.3, batch_size=4),
        sealign.DifferenceOperatorConfig(layers=(2,), gate=0.3, batch_size=4),
    ],
    ids=lambda config: type(config).__name__,
)
def test_every_method_takes_a_gate_at_the_site_of_its_edit(
    planted: Any, tokenizer: Any, config: Any, tmp_path: Path
) -> None:
    """ITI reads the heads, and edits the output of the block."""
    edit = sealign.fit_edit(planted, tokenizer, planted_demonstrations(12), config=config)
    assert isinstance(edit, sealign.Edit)
    assert edit.is_gated
    sites = resolve_sites(planted, config.site, edit.layers)
    neutral = collect_token_activations(planted, tokenizer, text_passages(tokenizer, neutral_texts()[::2]), sites)
    for layer in edit.layers:
        gate = edit.layer_edits[layer].gate
        assert gate is not None
        assert float(gate.is_open(neutral[layer]).double().mean()) == pytest.approx(0.3, abs=0.01)
        assert 0 <= edit.record.layers[str(layer)].statistics["gate_neutral_share"] <= 1
    edit.save_pretrained(tmp_path / "edit")
    loaded = sealign.load_edit(tmp_path / "edit")
    assert loaded.hash == edit.hash
    assert loaded.record.config["gate"] == 0.3


def test_refusals() -> None:
    for share in (0.0, 1.0, -0.1):
        with pytest.raises(SettingError, match=rf"gate is {share}"):
            _config(share)
    with pytest.raises(SettingError, match="a gate edits single tokens, but normalization is 'feature'"):
        sealign.SEAConfig(normalization="feature", gate=0.1)
