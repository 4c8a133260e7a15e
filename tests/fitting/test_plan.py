"""Plans against the models and edits that they are plans of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

import sealign
from sealign.errors import ModelError, SettingError
from sealign.fitting.collecting import collect_activations
from sealign.fitting.plan import measure_teraflops, plan_fit
from sealign.models.loading import load_skeleton
from sealign.models.structure import decoder_of


def test_tokens_are_those_that_are_run(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    run: list[int] = []
    hook = decoder_of(llama).register_forward_pre_hook(
        lambda _module, args, kwargs: run.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    config = sealign.FitConfig(batch_size=4)
    collect_activations(llama, tokenizer, demonstrations, config=config.collect_config())
    hook.remove()
    assert plan_fit(llama, tokenizer, demonstrations, config, teraflops=1.0).tokens == sum(run)


def test_bytes_and_parameters(llama: Any, tokenizer: Any, demonstrations: Any, small_edit: sealign.Edit) -> None:
    plan = plan_fit(llama, tokenizer, demonstrations, sealign.FitConfig(layers="all"), teraflops=1.0)
    assert plan.parameters == sum(parameter.numel() for parameter in llama.parameters())
    inside = sum(parameter.numel() for parameter in llama.model.layers.parameters())
    assert plan.active_parameters == pytest.approx(inside, rel=0.01)
    assert plan.model_bytes == 4 * plan.parameters
    collected = sealign.collect_activations(llama, tokenizer, demonstrations)
    rows = [matrix for role in ("neutral", "positive", "negative") for matrix in getattr(collected, role).values()]
    assert plan.kept_bytes == sum(matrix.nbytes for matrix in rows)
    assert plan.peak_bytes > plan.model_bytes + plan.kept_bytes
    assert plan.factor_bytes == sum(
        2 * 4 * small_edit.projections[small_edit.layers[0]].width for _ in llama.model.layers
    )


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
        plan = plan_fit(skeleton, tokenizer, demonstrations, teraflops=100.0, memory=2**34)
        assert plan.parameters == pytest.approx(parameters, rel=0.01), name
        assert plan.active_parameters == pytest.approx(active, rel=0.03), name
        assert plan.collection_seconds == pytest.approx(2 * plan.active_parameters * plan.tokens / 1e14, rel=0.2)


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(ModelError, match="cannot read the configuration"):
        load_skeleton(str(tmp_path))
    with pytest.raises(ModelError, match="there is no model"):
        load_skeleton("smollm3")


def test_rates(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    assert 1e-4 < measure_teraflops(64, 128, torch.float32) < 1e4
    with pytest.raises(SettingError, match="teraflops is 0"):
        plan_fit(llama, tokenizer, demonstrations, teraflops=0)
    slow, fast = (plan_fit(llama, tokenizer, demonstrations, teraflops=rate) for rate in (1.0, 4.0))
    assert slow.collection_seconds == pytest.approx(4 * fast.collection_seconds)
    assert 0 < slow.decomposition_seconds < 60
