from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import sealign
from sealign.errors import ActivationError, DegenerateError, DemonstrationError, SettingError, SiteError
from sealign.fitting.activation_store import Keep
from sealign.methods.sea import fit_projections, layer_signatures
from tests.shapes import unchecked


def _matrices(n: int = 9, d: int = 14, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    mixing = torch.randn(3, d, dtype=torch.float64)
    return [
        (torch.randn(n, 3, dtype=torch.float64) @ mixing + 0.1 * torch.randn(n, d).double()).to(dtype) for _ in "123"
    ]


def test_projection_against_numpy() -> None:
    neutral, positive, negative = _matrices()
    projection = sealign.fit_projection(neutral, positive, negative, explained_variance=(0.9, 0.6), centered=True)
    x = (neutral - neutral.mean(0)).numpy()
    for target, factor, share in ((positive, projection.positive, 0.9), (negative, projection.negative, 0.6)):
        y = (target - target.mean(0)).numpy()
        vectors, values, _ = np.linalg.svd(x.T @ y / 9)
        k = int(np.searchsorted(np.cumsum(values**2) / (values**2).sum(), share)) + 1
        assert factor.shape == (14, k)
        np.testing.assert_allclose(factor @ factor.T, vectors[:, :k] @ vectors[:, :k].T, atol=1e-10)
    torch.testing.assert_close(projection.mean, neutral.mean(0))


def test_ranks_for_each_side_and_types() -> None:
    matrices = _matrices(dtype=torch.float32)
    projection = sealign.fit_projection(*matrices, rank=(3, 1))
    assert (projection.rank_positive, projection.rank_negative) == (3, 1)
    assert projection.positive.dtype == torch.float32
    assert sealign.fit_projection(*[m.bfloat16() for m in matrices], rank=2).positive.dtype == torch.float32
    assert sealign.fit_projection(*[m.double() for m in matrices], rank=2).negative.dtype == torch.float64


def test_float32_takes_the_decisions_of_float64() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        matrices = [matrix.float() for matrix in _matrices()]
        single = sealign.fit_projection(*matrices, explained_variance=0.97)
        double = sealign.fit_projection(*[matrix.double() for matrix in matrices], explained_variance=0.97)
        assert single.rank_positive == double.rank_positive
        torch.testing.assert_close(single.positive.double(), double.positive, rtol=0, atol=1e-6)


def test_inputs_are_not_changed() -> None:
    matrices = _matrices()
    copies = [matrix.clone() for matrix in matrices]
    sealign.fit_projection(*matrices, centered=True, feature_map="tanh")
    assert all(torch.equal(a, b) for a, b in zip(matrices, copies, strict=True))


def test_refusals() -> None:
    neutral, positive, negative = _matrices()
    with unchecked(), pytest.raises(ActivationError, match=r"three \(n, d\) matrices of one shape"):
        sealign.fit_projection(neutral, positive[:-1], negative)
    with pytest.raises(ActivationError, match="1 demonstrations, but a fit needs at least 2"):
        sealign.fit_projection(neutral[:1], positive[:1], negative[:1])
    positive[4, 2] = float("inf")
    with pytest.raises(ActivationError, match="row 4 of the positive activations"):
        sealign.fit_projection(neutral, positive, negative)
    zero = torch.zeros_like(neutral)
    with pytest.raises(DegenerateError, match="neutral and negative activations: the cross-covariance is zero"):
        sealign.fit_projection(neutral, neutral, zero)
    with pytest.raises(SettingError, match=r"rank is 15, but it must be in \[1, 14\]"):
        sealign.fit_projection(neutral, neutral, neutral, rank=15)


def test_edit_reports_what_it_touches(small_edit: sealign.Edit, llama: Any) -> None:
    assert small_edit.layers == [1, 3]
    assert small_edit.modules == ["model.layers.1.mlp", "model.layers.3.mlp"]
    for layer in small_edit.layers:
        entry = small_edit.record.layers[str(layer)]
        assert (entry.rank_positive, entry.rank_negative) == (3, 2)
        assert 0 < entry.explained_variance_positive <= 1
        assert entry.relative_change > 0
        assert entry.signature > 0
    assert small_edit.record.demonstrations_count == 7
    assert small_edit.record.fit["strength"] == 0.7
    assert small_edit.record.versions.keys() == {"sealign", "torch", "transformers", "python"}


def test_fit_is_collection_then_projections(
    small_edit: sealign.Edit, llama: Any, tokenizer: Any, demonstrations: Any
) -> None:
    collected = sealign.collect_activations(llama, tokenizer, demonstrations, layers=[1, 3])
    for layer in (1, 3):
        expected = sealign.fit_projection(
            collected.neutral[layer], collected.positive[layer], collected.negative[layer], rank=(3, 2)
        )
        torch.testing.assert_close(small_edit.projections[layer].positive, expected.positive, rtol=1e-4, atol=1e-4)
        x = collected.neutral[layer]
        change = ((expected(x, strength=0.7) - x).norm(dim=1) / x.norm(dim=1)).mean()
        assert small_edit.record.layers[str(layer)].relative_change == pytest.approx(float(change), rel=1e-3)


def test_two_fits_are_equal_to_the_bit(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    config = sealign.FitConfig(layers="all", token="random", neutral="generated", max_new_tokens=3, seed=5)
    first, second = (sealign.fit_edit(llama, tokenizer, demonstrations, config=config) for _ in range(2))
    assert first.hash == second.hash
    assert first.record == second.record


def test_fitting_and_editing_sites_may_differ(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    config = sealign.FitConfig(site="mlp", fit_site="residual", layers=(2,), rank=2)
    edit = sealign.fit_edit(llama, tokenizer, demonstrations, config=config)
    assert edit.modules == ["model.layers.2.mlp"]
    residual = sealign.collect_activations(llama, tokenizer, demonstrations, site="residual", layers=[2])
    expected = sealign.fit_projection(residual.neutral[2], residual.positive[2], residual.negative[2], rank=2)
    torch.testing.assert_close(edit.projections[2].positive, expected.positive, rtol=1e-4, atol=1e-4)
    mlp = sealign.collect_activations(llama, tokenizer, demonstrations, site="mlp", layers=[2]).neutral[2]
    change = ((expected(mlp) - mlp).norm(dim=1) / mlp.norm(dim=1)).mean()
    assert edit.record.layers["2"].relative_change == pytest.approx(float(change), rel=1e-3)


def test_layers_by_signature(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    collected = sealign.collect_activations(llama, tokenizer, demonstrations)
    signatures = layer_signatures(collected)
    best = sorted(sorted(signatures, key=lambda layer: signatures[layer])[-2:])
    edit = sealign.fit_edit(llama, tokenizer, demonstrations, config=sealign.FitConfig(layers="signature:2"))
    assert edit.layers == best


def test_several_behaviours_together(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    """A joint edit is the edit of the pooled demonstrations: its covariance is the weighted mean of theirs."""
    config = sealign.FitConfig(layers=(1,), rank=1)
    parts = demonstrations[:3], demonstrations[3:]
    collected = [sealign.collect_activations(llama, tokenizer, part, layers=[1]) for part in parts]
    joint = sealign.fit_edit(llama, tokenizer, [*parts[0], *parts[1]], config=config)
    omega = sum(c.neutral[1].double().T @ c.positive[1].double() for c in collected) / 7
    vector = torch.linalg.svd(omega)[0][:, 0]
    assert abs(float(vector @ joint.projections[1].positive[:, 0].double())) == pytest.approx(1, abs=1e-5)


def test_reference_configuration_runs(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    import dataclasses

    config = dataclasses.replace(
        sealign.FitConfig.reference(), max_new_tokens=4, prompt_format=sealign.PromptFormat("chat")
    )
    edit = sealign.fit_edit(llama, tokenizer, demonstrations, config=config)
    assert edit.layers == [1, 2, 3]  # 21 of 32 in proportion to a depth of 4
    assert edit.settings.normalization == "feature"


def test_module_pattern_is_used_for_fitting_and_editing(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    config = sealign.FitConfig(layers=(1, 2), module_pattern="model.layers.{layer}.self_attn.o_proj", rank=2)
    edit = sealign.fit_edit(llama, tokenizer, demonstrations, config=config)
    assert edit.modules == [f"model.layers.{layer}.self_attn.o_proj" for layer in (1, 2)]
    by_site = sealign.fit_edit(
        llama, tokenizer, demonstrations, config=sealign.FitConfig(layers=(1, 2), site="attention", rank=2)
    )
    torch.testing.assert_close(edit.projections[1].positive, by_site.projections[1].positive, rtol=1e-4, atol=1e-4)


def test_wrong_sites_fail_before_anything_runs(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    calls: list[int] = []
    hook = llama.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(SiteError, match="layer 9 is outside"):
        sealign.fit_edit(llama, tokenizer, demonstrations, config=sealign.FitConfig(layers=(1, 9)))
    with pytest.raises(SiteError, match="selects 5 layers, but the model has 4"):
        sealign.fit_edit(llama, tokenizer, demonstrations, config=sealign.FitConfig(layers="last:5"))
    with pytest.raises(DemonstrationError, match="1 demonstrations, but a fit needs at least 2"):
        sealign.fit_edit(llama, tokenizer, demonstrations[:1])
    hook.remove()
    assert calls == []


def test_degenerate_layers_are_named(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    collected = sealign.collect_activations(llama, tokenizer, demonstrations, layers=[2])
    with pytest.raises(DegenerateError, match=r"layer 2: .*only \d+ singular values"):
        fit_projections(collected, config=sealign.FitConfig(rank=40))


@pytest.mark.parametrize("kept", ["rows", "sums"])
@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("layers", ["all", "signature:2"])
def test_what_is_kept_and_where_makes_no_difference(
    kept: Any, place: Any, layers: str, llama: Any, tokenizer: Any, demonstrations: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("sealign.collected.CHUNK", 3)
    config = sealign.FitConfig(layers=layers, rank=(3, 2), centered=True, token="random")
    expected = sealign.fit_edit(llama, tokenizer, demonstrations, config=config)
    found = sealign.fit_edit(llama, tokenizer, demonstrations, config=config, keep=Keep(kept, place))
    assert found.layers == expected.layers
    for layer, projection in expected.projections.items():
        for name in ("positive", "negative"):
            own, other = getattr(found.projections[layer], name), getattr(projection, name)
            torch.testing.assert_close(own @ own.T, other @ other.T, atol=1e-4, rtol=1e-4)
        records = [edit.record.layers[str(layer)] for edit in (found, expected)]
        assert records[0].relative_change == pytest.approx(records[1].relative_change, rel=1e-3)
        assert records[0].signature == pytest.approx(records[1].signature, rel=1e-4)
