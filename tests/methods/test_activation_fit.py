"""Edits fitted from activations that were collected before, and the pipeline that the methods share."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sealign
from sealign.demonstrations.demonstration import Demonstration
from sealign.errors import ActivationError, DemonstrationError, ModelError, SettingError, SiteError, WorkerError
from sealign.fitting.activation_store import Keep
from sealign.fitting.collect_config import CollectConfig
from sealign.fitting.edit_config import EditConfig
from sealign.methods.activation_fit import layerwise_method
from sealign.methods.method import FitContext
from sealign.methods.registry import fit_edit, fit_edit_from_activations
from sealign.models.recorder import Recorder
from sealign.models.sites import resolve_sites
from tests.tiny_models import build_model

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


def test_more_workers_than_demonstrations_are_refused(
    llama: Any, tokenizer: Any, demonstrations: list[Demonstration], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sealign.methods.activation_fit.rank_and_size", lambda: (2, 8))
    with pytest.raises(WorkerError, match="there are 8 workers for 7 demonstrations; start at most as many workers"):
        fit_edit(llama, tokenizer, demonstrations)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("demonstrations.jsonl", "demonstrations is 'demonstrations.jsonl', but .* with load_demonstrations"),
        (Path("a.csv"), r"demonstrations is PosixPath\('a.csv'\)"),
        (None, "demonstrations is None, but it must be a sequence of demonstrations"),
        ([{"prompt": "a"}], r"demonstrations\[0\] is of type dict, but it must be a Demonstration; make one with"),
        (Demonstration("a", "b", "c"), "but it must be a sequence"),
    ],
)
def test_what_are_no_demonstrations_is_refused(given: Any, message: str, llama: Any, tokenizer: Any) -> None:
    with pytest.raises(DemonstrationError, match=message):
        fit_edit(llama, tokenizer, given)
    with pytest.raises(DemonstrationError, match=message):
        sealign.collect_activations(llama, tokenizer, given)


def test_demonstrations_may_come_from_a_generator(
    llama: Any, tokenizer: Any, demonstrations: list[Demonstration]
) -> None:
    layers: Any = np.array([1, 3])
    config = sealign.SEAConfig(rank=2, layers=layers)
    expected = fit_edit(llama, tokenizer, demonstrations, config=config)
    assert fit_edit(llama, tokenizer, (item for item in demonstrations), config=config).hash == expected.hash
    given: Any = iter(demonstrations)
    found = sealign.collect_activations(llama, tokenizer, given, layers=layers)
    assert found.layers == [1, 3]
    assert {type(layer) for layer in found.layers} == {int}


def test_a_pattern_serves_where_the_layers_cannot_be_found(tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    model.model.twin = nn.ModuleList(model.model.layers)
    config = sealign.SEAConfig(rank=2, layers=[1, 2], site="attention")
    with pytest.raises(SiteError, match=r"2 lists of 4 decoder layers.*name the modules with module_pattern"):
        fit_edit(model, tokenizer, demonstrations, config=config)
    named = config.replace(module_pattern="model.layers.{layer}.self_attn")
    edit = fit_edit(model, tokenizer, demonstrations, config=named)
    assert edit.modules == ["model.layers.1.self_attn", "model.layers.2.self_attn"]
    with sealign.apply_edit(model, edit) as handle:
        assert handle.modules == edit.modules


@pytest.mark.parametrize("name", ["jamba", "gpt_neo"])
def test_hybrid_models_collect_as_if_each_text_ran_alone(
    name: str, tiny_model: Callable[[str], Any], tokenizer: Any, demonstrations: list[Demonstration]
) -> None:
    """Though all texts begin alike, which plain models run once."""
    model, items = tiny_model(name), demonstrations[:3]
    form = sealign.PromptFormat("few_shot", "The town lies by the river and the river rises in the hills.")
    config = CollectConfig(prompt_format=form, batch_size=4)
    found = sealign.collect_activations(model, tokenizer, items, site="residual", layers=[2], config=config)
    (site,) = resolve_sites(model, "residual", [2])
    for row, item in enumerate(items):
        ids = form.encode(tokenizer, item.prompt, item.negative)
        with torch.no_grad(), Recorder([site], lambda output, _: output[0, -1].clone()) as recorder:
            model(input_ids=torch.tensor([ids]), use_cache=False)
        torch.testing.assert_close(found.negative[2][row], recorder.recorded[2], rtol=1e-4, atol=1e-4)


def test_tokens_that_the_model_does_not_embed(llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    """Added to the tokenizer, but not to the model: harmless for padding, refused in a text."""
    config = sealign.SEAConfig(rank=2, layers=[1])
    wider = copy.deepcopy(tokenizer)
    wider.add_special_tokens({"pad_token": "[PAD]"})
    assert wider.pad_token_id == llama.get_input_embeddings().weight.shape[0]
    expected = fit_edit(llama, tokenizer, demonstrations, config=config)
    found = fit_edit(llama, wider, demonstrations, config=config)
    assert torch.equal(found.affine_edits[1].left, expected.affine_edits[1].left)
    text = Demonstration("What is [PAD]?", "A token.", "A word.")
    with pytest.raises(ModelError, match=r"the tokenizer gives token (\d+), but the model embeds \1 tokens"):
        fit_edit(llama, wider, [*demonstrations, text], config=config)
