"""Plans against the models and edits that they are plans of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

import sealign
from sealign.errors import ModelError, SettingError, SiteError
from sealign.fitting.activation_store import Keep
from sealign.fitting.edit_config import EditConfig
from sealign.fitting.plan import measure_tflops, plan_fit
from sealign.methods.registry import fit_edit
from sealign.models.loading import load_skeleton
from sealign.models.sites import resolve_sites
from sealign.models.structure import decoder_of
from tests.tiny_models import build_model


@pytest.mark.parametrize(
    "config",
    [
        sealign.SEAConfig(batch_size=4),
        sealign.MeanDifferenceConfig(batch_size=3, layers=[1]),
        sealign.ITIConfig(batch_size=4, heads=2),
        sealign.LEACEConfig(batch_size=4, layers="0,2"),
    ],
    ids=lambda config: type(config).__name__,
)
def test_tokens_are_those_that_are_run(config: EditConfig, llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    resolve_sites(llama, config.site)  # runs the model on a few tokens, the first time
    run: list[int] = []
    hook = decoder_of(llama).register_forward_pre_hook(
        lambda _module, args, kwargs: run.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    fit_edit(llama, tokenizer, demonstrations, config=config)
    hook.remove()
    # ITI runs the model on two tokens, to find the output matrix of each layer's attention; twice in a fit.
    extra = 2 * 2 if isinstance(config, sealign.ITIConfig) else 0
    assert plan_fit(llama, tokenizer, demonstrations, config, tflops=1.0).tokens == sum(run) - extra


def test_bytes_and_parameters(llama: Any, tokenizer: Any, demonstrations: Any, small_edit: sealign.Edit) -> None:
    plan = plan_fit(llama, tokenizer, demonstrations, sealign.SEAConfig(layers="all"), tflops=1.0)
    assert plan.parameters == sum(parameter.numel() for parameter in llama.parameters())
    inside = sum(parameter.numel() for parameter in llama.model.layers.parameters())
    assert plan.active_parameters == pytest.approx(inside, rel=0.01)
    assert plan.model_bytes == 4 * plan.parameters
    collected = sealign.collect_activations(llama, tokenizer, demonstrations)
    rows = [matrix for role in ("neutral", "positive", "negative") for matrix in getattr(collected, role).values()]
    assert plan.kept_bytes == sum(matrix.nbytes for matrix in rows)
    assert plan.peak_bytes > plan.model_bytes + plan.kept_bytes
    assert plan.factor_bytes == sum(2 * 4 * small_edit.width for _ in llama.model.layers)


@pytest.mark.parametrize(("heads", "width"), [(12, 48), (20, 80)])
def test_heads_are_read_at_their_own_width(heads: int, width: int, tokenizer: Any, demonstrations: Any) -> None:
    """Heads side by side may be wider than the model; rows are stored, since ITI cannot be fitted from sums."""
    model = build_model("qwen3", vocab_size=len(tokenizer), head_dim=heads)
    many = [demonstrations[0]] * 200
    plan = plan_fit(model, tokenizer, many, sealign.ITIConfig(), tflops=1.0)
    assert (plan.layers, plan.width, plan.keep) == (4, width, Keep("rows", "memory"))
    assert plan.kept_bytes == 4 * 3 * 4 * 200 * width
    assert plan.decomposition_seconds == 0
    assert plan_fit(model, tokenizer, many, sealign.SEAConfig(), tflops=1.0).keep.kept == "sums"


def test_layers_by_signature_are_all_collected(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    everything, chosen = (
        plan_fit(llama, tokenizer, demonstrations, sealign.SEAConfig(layers=layers), tflops=1.0)
        for layers in ("all", "signature:2")
    )
    assert (everything.layers, chosen.layers) == (4, 2)
    assert chosen.kept_bytes == everything.kept_bytes
    assert chosen.factor_bytes == everything.factor_bytes / 2


def test_layers_that_need_a_pass_each(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    one, three = (
        plan_fit(llama, tokenizer, demonstrations, sealign.LEACEConfig(layers=layers), tflops=1.0)
        for layers in ("1", "0,1,3")
    )
    assert three.tokens == 3 * one.tokens
    assert three.collection_seconds == pytest.approx(3 * one.collection_seconds)
    assert three.kept_bytes == one.kept_bytes


def test_what_the_model_does_not_have_is_refused(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    with pytest.raises(SiteError, match="layer 9 is outside"):
        plan_fit(llama, tokenizer, demonstrations, sealign.SEAConfig(layers=(1, 9)), tflops=1.0)


def test_named_models_by_their_configuration_alone(tmp_path: Path, demonstrations: Any) -> None:
    """Parameters as their authors give them; nothing of the weights is allocated."""
    known = {
        "Llama 2 7B": (LlamaConfig(), 6.74e9, 6.48e9),
        "Mixtral 8x7B": (MixtralConfig(), 46.7e9, 12.6e9),
    }
    for name, (config, parameters, active) in known.items():
        folder = tmp_path / name.replace(" ", "-")
        config.architectures = None
        config.save_pretrained(folder)
        skeleton, tokenizer = load_skeleton(str(folder), dtype="bfloat16")
        assert tokenizer is None
        plan = plan_fit(skeleton, tokenizer, demonstrations, tflops=100.0, free_memory=2**34)
        assert plan.parameters == pytest.approx(parameters, rel=0.01), name
        assert plan.active_parameters == pytest.approx(active, rel=0.03), name
        assert plan.collection_seconds == pytest.approx(2 * plan.active_parameters * plan.tokens / 1e14, rel=0.2)
        heads = plan_fit(skeleton, tokenizer, demonstrations, sealign.ITIConfig(), tflops=100.0, free_memory=2**34)
        assert (heads.width, heads.layers) == (4096, 32)


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(ModelError, match="cannot read the configuration"):
        load_skeleton(str(tmp_path))
    with pytest.raises(ModelError, match="there is no model"):
        load_skeleton("smollm3")


def test_rates(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    assert 1e-4 < measure_tflops(64, 128, torch.float32) < 1e4
    for rate in (0, -1.0, float("inf")):
        with pytest.raises(SettingError, match=f"tflops is {rate}, but it must be finite and above 0"):
            plan_fit(llama, tokenizer, demonstrations, tflops=rate)
    config = sealign.SEAConfig()
    slow, fast = (plan_fit(llama, tokenizer, demonstrations, config, tflops=rate) for rate in (1.0, 4.0))
    assert slow.collection_seconds == pytest.approx(4 * fast.collection_seconds)
    assert 0 < slow.decomposition_seconds < 60
    assert plan_fit(llama, tokenizer, demonstrations, sealign.MeanDifferenceConfig(), tflops=1.0).tflops == 1.0
