"""The record of an edit: its numbers against formulas in float64, its hashes against hashlib."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from sealign.edits.provenance import build_edit, relative_change
from sealign.edits.record import EditSettings, dump_record, parse_record
from sealign.methods.sea_config import FitConfig
from sealign.models.fingerprint import model_fingerprint
from sealign.models.prompt_format import PromptFormat, default_preamble
from sealign.spectral.projection import Projection
from tests.tiny_models import build_model

D, N = 11, 6
LINEAR = EditSettings("mlp", "both", "none", 1.0, "identity", False)


def _projection(ranks: tuple[int, int], mean: Tensor | None = None) -> Projection:
    """Of random directions; more singular values are known than directions are kept."""
    bases = [torch.linalg.qr(torch.randn(D, k, dtype=torch.float64))[0] for k in ranks]
    values = [torch.arange(k + 2, 0, -1).double() for k in ranks]
    return Projection(*bases, mean, "identity", *values, 210.0, 130.0)


def _by_hand(projection: Projection, tokens: Tensor, settings: EditSettings) -> float:
    plus, minus = (factor.double().numpy() for factor in (projection.positive, projection.negative))
    changes = []
    for x in tokens.double().numpy():
        kept, dropped = plus @ (plus.T @ x), x - minus @ (minus.T @ x)
        y = {"both": kept + dropped, "positive": kept, "negative": dropped}[settings.combine]
        if settings.normalization == "token":
            y = y * np.sqrt(np.sum(x**2) / np.sum(y**2))
        edited = x + settings.strength * (y - x)
        changes.append(np.sqrt(np.sum((edited - x) ** 2) / np.sum(x**2)))
    return float(np.mean(changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("combine", ["both", "positive", "negative"])
@pytest.mark.parametrize("normalization", ["token", "none"])
@pytest.mark.parametrize("strength", [0.6, -1.5])
def test_relative_change(dtype: torch.dtype, combine: str, normalization: str, strength: float) -> None:
    projection = _projection((4, 2))
    tokens = (torch.randn(N, D, dtype=torch.float64) * torch.logspace(-2, 2, N)[:, None]).to(dtype)
    settings = EditSettings("mlp", combine, normalization, strength, "identity", False)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    expected = _by_hand(projection, tokens, settings)
    assert relative_change(projection, tokens, settings) == pytest.approx(expected, rel=tolerance)


def test_strength_zero_is_no_change() -> None:
    settings = dataclasses.replace(LINEAR, strength=0.0)
    assert relative_change(_projection((4, 2)), torch.randn(N, D), settings) == 0.0


@pytest.mark.parametrize("normalization", ["token", "none"])
@pytest.mark.parametrize("mean", [None, 10.0])
def test_zero_tokens_are_left_out(normalization: str, mean: float | None) -> None:
    """A centred edit moves even a zero token, by infinitely many times its length."""
    settings = dataclasses.replace(LINEAR, normalization=normalization)
    projection = _projection((4, 2))
    if mean is not None:
        projection = dataclasses.replace(projection, mean=torch.full((D,), mean))
    tokens = torch.randn(N, D)
    others = relative_change(projection, tokens, settings)
    with_zero = relative_change(projection, torch.cat([torch.zeros(1, D), tokens]), settings)
    assert with_zero == pytest.approx(others, rel=1e-5)
    assert relative_change(projection, torch.zeros(3, D), settings) == 0.0


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return build_model("llama", vocab_size=len(tokenizer))


@pytest.fixture
def parts() -> dict[str, Any]:
    """Projections, neutral activations and signatures of two layers that have nothing in common."""
    return {
        "projections": {3: _projection((4, 2)), 1: _projection((3, 5))},
        "changes": {1: 0.75, 3: 0.0625},
        "signatures": {0: 0.25, 1: 1.5, 2: 8.0, 3: 6.5},
    }


def test_layers(model: Any, tokenizer: Any, demonstrations: Any, parts: Any) -> None:
    config = FitConfig(site="attention", combine="positive", normalization="none", strength=0.4)
    edit = build_edit(model, tokenizer, demonstrations, **parts, config=config)
    assert edit.record.settings == EditSettings("attention", "positive", "none", 0.4, "identity", False)
    assert list(edit.projections) == [1, 3]
    assert list(edit.record.layers) == ["1", "3"]
    assert edit.modules == ["model.layers.1.self_attn", "model.layers.3.self_attn"]
    # Sums of the squares of the first k of k + 2, k + 1, ... 1.
    known = {1: ((3, 25 + 16 + 9), (5, 49 + 36 + 25 + 16 + 9)), 3: ((4, 36 + 25 + 16 + 9), (2, 16 + 9))}
    for layer, ((plus, plus_energy), (minus, minus_energy)) in known.items():
        assert edit.projections[layer] is parts["projections"][layer]
        record = edit.record.layers[str(layer)]
        assert (record.rank_positive, record.rank_negative) == (plus, minus)
        assert (record.energy_positive, record.energy_negative) == (210.0, 130.0)
        assert record.explained_variance_positive == pytest.approx(plus_energy / 210)
        assert record.explained_variance_negative == pytest.approx(minus_energy / 130)
        assert record.signature == parts["signatures"][layer]
        assert record.relative_change == parts["changes"][layer]


def test_modules_by_pattern(model: Any, tokenizer: Any, demonstrations: Any, parts: Any) -> None:
    config = FitConfig(module_pattern="model.layers.{layer}.mlp.up_proj")
    edit = build_edit(model, tokenizer, demonstrations, **parts, config=config)
    assert edit.modules == ["model.layers.1.mlp.up_proj", "model.layers.3.mlp.up_proj"]


def test_hashes_and_versions(model: Any, tokenizer: Any, demonstrations: Any, parts: Any) -> None:
    record = build_edit(model, tokenizer, demonstrations, **parts, config=FitConfig()).record
    lines = [json.dumps([item.prompt, item.positive, item.negative]) for item in demonstrations]
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    assert record.demonstrations_count == 7
    assert record.demonstrations_hash == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert record.model.tokenizer_hash == hashlib.sha256(vocabulary.encode()).hexdigest()
    assert record.model.template_hash == hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
    assert record.model.fingerprint == model_fingerprint(model)
    assert record.model.fingerprint["layer_classes"] == "LlamaDecoderLayer x 4"
    assert sorted(record.versions) == ["python", "sealign", "torch", "transformers"]
    assert record.versions["transformers"] == transformers.__version__
    assert record.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record.versions["python"] == platform.python_version()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (FitConfig(), {"layers": "last:21/32", "rank": None, "prompt_format": {"style": "chat", "preamble": None}}),
        (
            FitConfig(
                rank=(3, 2), layers=(1, 3), explained_variance=(0.9, 0.8), prompt_format=PromptFormat("few_shot")
            ),
            {
                "rank": [3, 2],
                "layers": [1, 3],
                "explained_variance": [0.9, 0.8],
                "prompt_format": {"style": "few_shot", "preamble": default_preamble()},
            },
        ),
    ],
)
def test_the_settings_of_the_fit_are_json(
    config: FitConfig, expected: Any, model: Any, tokenizer: Any, demonstrations: Any, parts: Any
) -> None:
    fit = build_edit(model, tokenizer, demonstrations, **parts, config=config).record.fit
    assert json.loads(json.dumps(fit, allow_nan=False)) == fit
    assert {name: fit[name] for name in expected} == expected
    assert set(fit) == {field.name for field in dataclasses.fields(FitConfig)}


def test_a_record_comes_back_from_its_text(model: Any, tokenizer: Any, demonstrations: Any, parts: Any) -> None:
    config = FitConfig(rank=(3, 2), layers=(1, 3))
    record = build_edit(model, tokenizer, demonstrations, **parts, config=config).record
    assert parse_record(dump_record(record), "edit.json") == record


def test_the_models_name_and_revision(tokenizer: Any, demonstrations: Any, parts: Any) -> None:
    def recorded(model: nn.Module) -> tuple[str, str | None]:
        record = build_edit(model, tokenizer, demonstrations, **parts, config=FitConfig()).record.model
        return record.id, record.revision

    model = build_model("llama", vocab_size=len(tokenizer))
    assert recorded(model) == ("LlamaForCausalLM", None)  # built from a configuration: its name is empty
    model.name_or_path, model.config._commit_hash = "someone/small-llama", "0a1b2c"
    assert recorded(model) == ("someone/small-llama", "0a1b2c")
    wrapped = nn.Module()
    wrapped._orig_mod = model  # as torch.compile does
    assert recorded(wrapped) == ("someone/small-llama", "0a1b2c")


def test_a_model_that_has_no_name(model: Any, tokenizer: Any, demonstrations: Any, parts: Any) -> None:
    class Nameless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.config = model.model, model.config

    edit = build_edit(Nameless(), tokenizer, demonstrations, **parts, config=FitConfig())
    assert edit.record.model.id == "Nameless"
    assert edit.modules == ["model.layers.1.mlp", "model.layers.3.mlp"]
