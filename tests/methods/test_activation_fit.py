"""Edits fitted from activations that were collected before, and the pipeline that the methods share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import sealign
from sealign.demonstrations.demonstration import Demonstration
from sealign.errors import ActivationError, DemonstrationError, SettingError, SiteError, WorkerError
from sealign.fitting.activation_store import Keep
from sealign.fitting.edit_config import EditConfig
from sealign.methods.activation_fit import layerwise_method
from sealign.methods.method import FitContext
from sealign.methods.registry import fit_edit, fit_edit_from_activations

CONFIGS: dict[str, EditConfig] = {
    "sea": sealign.SEAConfig(explained_variance=0.95, centered=True, layers="last:2", token="mean"),
    "sea by signature": sealign.SEAConfig(rank=2, layers="signature:2", centered=True),
    "phi sea": sealign.SEAConfig(rank=2, layers=[0, -1], feature_map="elu"),
    "sea at another site": sealign.SEAConfig(rank=2, layers=[1, 2], fit_site="residual"),
    "mean difference": sealign.MeanDifferenceConfig(layers="all", strength=0.5, normalization="token"),
    "mean difference by signature": sealign.MeanDifferenceConfig(layers="signature:1"),
    "iti": sealign.ITIConfig(heads=3),
    "iti of some layers": sealign.ITIConfig(heads=2, layers=[1, 3], direction="probe", strength=0.5),
    "iti by signature": sealign.ITIConfig(heads=5, layers="signature:2"),
    "leace": sealign.LEACEConfig(layers=[2], strength=0.8),
}


def collected(model: Any, tokenizer: Any, items: list[Demonstration], config: EditConfig) -> sealign.Activations:
    return sealign.collect_activations(
        model, tokenizer, items, site=config.read_site, config=config.collect_config(), layers=None
    )


@pytest.mark.parametrize("name", list(CONFIGS))
def test_an_edit_from_activations_is_the_same_to_the_bit(
    name: str, llama: Any, tokenizer: Any, demonstrations: list[Demonstration]
) -> None:
    config = CONFIGS[name]
    expected = fit_edit(llama, tokenizer, demonstrations, config=config)
    activations = collected(llama, tokenizer, demonstrations, config)
    calls: list[int] = []
    hook = llama.model.layers[-1].register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0].shape[1]))
    found = fit_edit_from_activations(llama, tokenizer, activations, demonstrations, config=config)
    hook.remove()
    assert found.hash == expected.hash
    assert {k: v.tolist() for k, v in found.tensors().items()} == {k: v.tolist() for k, v in expected.tensors().items()}
    assert dataclasses.replace(found.record, fit_seconds=0.0) == dataclasses.replace(expected.record, fit_seconds=0.0)
    # The model runs over demonstrations only where it has to; two tokens find the output matrices of the heads.
    assert all(length == 2 for length in calls) or name == "sea at another site"
    assert bool(calls) is (config.read_site != config.site)


def test_one_collection_serves_many_fits(llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    activations = sealign.collect_activations(llama, tokenizer, demonstrations, site="residual")
    edits = [
        fit_edit_from_activations(llama, tokenizer, activations, demonstrations, config=config)
        for config in (
            sealign.SEAConfig(site="residual", rank=2),
            sealign.MeanDifferenceConfig(layers=[0]),
            sealign.LEACEConfig(layers=[3]),
        )
    ]
    assert [edit.layers for edit in edits] == [[1, 2, 3], [0], [3]]
    assert {edit.site for edit in edits} == {"residual"}


def test_activations_that_do_not_fit_are_refused(
    llama: Any, tokenizer: Any, demonstrations: list[Demonstration]
) -> None:
    activations = sealign.collect_activations(llama, tokenizer, demonstrations, layers=[1, 2])

    def fit(config: Any, items: list[Demonstration] = demonstrations) -> Any:
        return fit_edit_from_activations(llama, tokenizer, activations, items, config=config)

    with pytest.raises(ActivationError, match="read at the site 'mlp', but MeanDifferenceConfig needs 'residual'"):
        fit(sealign.MeanDifferenceConfig(layers=[1]))
    with pytest.raises(ActivationError, match="site 'mlp', but ITIConfig needs 'heads'; collect them there"):
        fit(sealign.ITIConfig())
    for config in (
        sealign.SEAConfig(layers=[1, 3], rank=2),
        sealign.SEAConfig(layers="signature:1", rank=2),
        sealign.LEACEConfig(site="mlp", layers=[3]),
    ):
        with pytest.raises(ActivationError, match=r"the activations of layer [03] were not collected; .* \[1, 2\]"):
            fit(config)
    with pytest.raises(ActivationError, match="there are 6 demonstrations, but the activations were collected from 7"):
        fit(sealign.SEAConfig(layers=[1], rank=2), demonstrations[:-1])
    with pytest.raises(SettingError, match="dola cannot be fitted from activations; use fit_edit"):
        fit(sealign.DoLaConfig())
    with pytest.raises(SettingError, match="which is 2 layers, but LEACE fits each layer on activations"):
        fit(sealign.LEACEConfig(site="mlp", layers=[1, 2]))
    with pytest.raises(DemonstrationError, match="needs at least 2"):
        fit(sealign.SEAConfig(layers=[1], rank=2), demonstrations[:1])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(WorkerError, match="outside worker_group"):
        patch.setattr("sealign.methods.activation_fit.rank_and_size", lambda: (0, 2))
        fit(sealign.SEAConfig(layers=[1], rank=2))


@pytest.mark.parametrize("config", [sealign.ITIConfig(), sealign.LEACEConfig()])
def test_methods_that_need_rows_store_rows(
    config: EditConfig, llama: Any, tokenizer: Any, demonstrations: list[Demonstration]
) -> None:
    assert config.needs_rows
    if isinstance(config, sealign.ITIConfig):  # LEACE collects by itself, one layer at a time
        many = demonstrations * 10  # whose sums are smaller
        assert fit_edit(llama, tokenizer, many, config=config).layers
        with pytest.raises(SettingError, match="ITIConfig needs rows; pass keep=Keep"):
            fit_edit(llama, tokenizer, demonstrations, config=config, keep=Keep("sums"))
        on_disk = fit_edit(llama, tokenizer, demonstrations, config=config, keep=Keep("rows", "disk"))
        assert on_disk.hash == fit_edit(llama, tokenizer, demonstrations, config=config).hash


@pytest.mark.parametrize("kept", ["rows", "sums"])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_mean_difference_of_rows_and_of_sums(
    kept: Any, place: Any, llama: Any, tokenizer: Any, demonstrations: list[Demonstration], tmp_path: Path
) -> None:
    config = sealign.MeanDifferenceConfig(layers="all")
    expected = fit_edit(llama, tokenizer, demonstrations, config=config)
    found = fit_edit(llama, tokenizer, demonstrations, config=config, keep=Keep(kept, place), checkpoint_dir=tmp_path)
    assert found.hash == expected.hash
    assert list(tmp_path.iterdir()) == []


def test_wrong_sites_fail_before_anything_runs(llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    calls: list[int] = []
    hook = llama.model.register_forward_pre_hook(lambda *_: calls.append(1))
    for kind in (sealign.SEAConfig, sealign.MeanDifferenceConfig, sealign.LEACEConfig):
        with pytest.raises(SiteError, match="layer 9 is outside"):
            fit_edit(llama, tokenizer, demonstrations, config=kind(layers=(1, 9)))
        with pytest.raises(SiteError, match="'last:5' selects 5 layers, but the model has 4"):
            fit_edit(llama, tokenizer, demonstrations, config=kind(layers="last:5"))
        with pytest.raises(SiteError, match="no module 'model.layers.0.nothing'"):
            pattern = "model.layers.{layer}.nothing"
            fit_edit(llama, tokenizer, demonstrations, config=kind(layers="0", module_pattern=pattern))
    hook.remove()
    assert calls == []


def test_a_layer_that_cannot_be_fitted_is_named(
    llama: Any, tokenizer: Any, demonstrations: list[Demonstration]
) -> None:
    class Unfit(ActivationError):
        pass

    def fitter(*_: Any) -> Any:
        raise Unfit("it is too small; give more")

    method = layerwise_method("unfit", EditConfig, fitter)
    activations = sealign.collect_activations(llama, tokenizer, demonstrations, layers=[2])
    context = FitContext(llama, tokenizer, demonstrations)
    assert method.fit_activations is not None
    with pytest.raises(Unfit, match="layer 2: it is too small; give more"):
        method.fit_activations(context, activations, EditConfig(layers=[2]))


def test_the_relative_change_is_that_of_the_neutral_rows(
    llama: Any, tokenizer: Any, demonstrations: list[Demonstration]
) -> None:
    config = sealign.MeanDifferenceConfig(layers=[0, 2], strength=0.6)
    edit: Any = fit_edit(llama, tokenizer, demonstrations, config=config)
    rows = sealign.collect_activations(llama, tokenizer, demonstrations, site="residual").neutral
    for layer, edited in edit.apply_to(rows).items():
        change = ((edited - rows[layer]).norm(dim=1) / rows[layer].norm(dim=1)).mean()
        assert edit.record.layers[str(layer)].relative_change == pytest.approx(float(change), rel=1e-5)
        assert torch.allclose(edited - rows[layer], 0.6 * edit.affine_edits[layer].shift, atol=1e-5)
