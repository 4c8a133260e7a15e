"""Sensitivities against finite differences of the edited model, and against divergences that are summed exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sealign
from sealign.edits.affine_edit import AffineEdit
from sealign.edits.attach import apply_edit
from sealign.evaluation.sensitivity import PlacedEdit, mean_log_probability_derivatives, sampled_score_derivatives
from sealign.methods.registry import fit_edit
from sealign.models.passages import Passage
from sealign.models.sites import resolve_sites
from tests.conftest import our_hooks
from tests.tiny_models import build_model

PASSAGES = [Passage((5, 9, 2, 7, 11, 3), 2), Passage((4, 8, 6), 1), Passage((12, 5, 5, 9, 7, 3, 2, 10, 6), 5)]
"""Of unequal lengths, scored from different positions on."""


def _log_probabilities(model: Any, passage: Passage) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([passage.ids])).logits[0]
    return torch.log_softmax(logits.double(), -1)[passage.start - 1 : -1]


def _mean(model: Any, passage: Passage) -> float:
    logs = _log_probabilities(model, passage)
    return float(logs.gather(1, torch.tensor(passage.ids[passage.start :])[:, None]).mean())


@pytest.fixture
def edits(llama: Any, tokenizer: Any, demonstrations: Any) -> list[Any]:
    """Edits of one layer each: affine at every site, rescaled per token, and with a feature map."""
    configs = [
        sealign.MeanDifferenceConfig(site="residual", layers=[2]),
        sealign.DifferenceOperatorConfig(site="mlp", layers=[1], rank=2),
        sealign.SEAConfig(site="attention", layers=[3], rank=(3, 2), centered=True),
        sealign.SEAConfig(site="residual", layers=[1], rank=(3, 2), feature_map="tanh"),
    ]
    return [fit_edit(llama, tokenizer, demonstrations, config=config) for config in configs]


def _placed(edits: list[Any]) -> list[PlacedEdit]:
    return [PlacedEdit(edit.site, layer, own) for edit in edits for layer, own in edit.layer_edits.items()]


def _sites(model: Any) -> Any:
    return {site: resolve_sites(model, site) for site in ("mlp", "attention", "residual")}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_against_finite_differences(batch_size: int, edits: list[Any], llama: Any, tokenizer: Any) -> None:
    found = mean_log_probability_derivatives(
        llama, tokenizer, PASSAGES, _placed(edits), _sites(llama), batch_size=batch_size
    )
    step = 2e-3
    for column, edit in enumerate(edits):
        for row, passage in enumerate(PASSAGES):
            ends = []
            for strength in (step, -step):
                with apply_edit(llama, edit, strength=strength):
                    ends.append(_mean(llama, passage))
            assert found[row, column] == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=2e-3, rel=2e-2)
    assert found.abs().min() > 0


def test_the_divergence_of_edits_together(edits: list[Any], llama: Any, tokenizer: Any) -> None:
    """s^T A s / 2, with A from drawn tokens, is the mean KL that is summed over the vocabulary."""
    chosen = [edits[0], edits[1]]  # at two sites, so that both can be attached
    placed, sites = _placed(chosen), _sites(llama)
    draws, means = sampled_score_derivatives(llama, tokenizer, PASSAGES, placed, sites, samples=600)
    torch.testing.assert_close(means, mean_log_probability_derivatives(llama, tokenizer, PASSAGES, placed, sites))
    assert draws.shape == (600 * len(PASSAGES), 2)
    tokens = sum(passage.count for passage in PASSAGES)
    strengths = torch.tensor([0.02, -0.03], dtype=torch.float64)
    predicted = float(strengths @ (draws.T @ draws / (600 * tokens)) @ strengths / 2)
    total = 0.0
    for passage in PASSAGES:
        base = _log_probabilities(llama, passage)
        with apply_edit(llama, chosen[0], strength=0.02), apply_edit(llama, chosen[1], strength=-0.03):
            edited = _log_probabilities(llama, passage)
        total += float((base.exp() * (base - edited)).sum())
    assert predicted == pytest.approx(total / tokens, rel=0.15)


def test_draws_are_repeatable(edits: list[Any], llama: Any, tokenizer: Any) -> None:
    placed, sites = _placed(edits[:1]), _sites(llama)
    first, again, other = (
        sampled_score_derivatives(llama, tokenizer, PASSAGES, placed, sites, seed=seed)[0] for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "mixtral", "gpt_neox", "falcon"])
def test_other_architectures(name: str, tokenizer: Any) -> None:
    model = build_model(name, vocab_size=len(tokenizer))
    model.requires_grad_(False)
    direction = torch.randn(48, generator=torch.Generator().manual_seed(0)) / 48
    sites = _sites(model)
    placed = [PlacedEdit(site, 2, AffineEdit.constant(direction)) for site in sites]
    found = mean_log_probability_derivatives(model, tokenizer, PASSAGES[:2], placed, sites)
    for column, (site, resolved) in enumerate(sites.items()):
        ends = []
        for step in (2e-3, -2e-3):
            module = next(each.module for each in resolved if each.layer == 2)

            def shift(_module: Any, _inputs: Any, output: Any, step: float = step) -> Any:
                moved = (output[0] if isinstance(output, tuple) else output) + step * direction
                return (moved, *output[1:]) if isinstance(output, tuple) else moved

            hook = module.register_forward_hook(shift)
            ends.append([_mean(model, passage) for passage in PASSAGES[:2]])
            hook.remove()
        expected = [(up - down) / 4e-3 for up, down in zip(*ends, strict=True)]
        assert found[:, column].tolist() == pytest.approx(expected, abs=2e-3, rel=2e-2), site


def test_the_model_is_left_as_it_was(edits: list[Any], llama: Any, tokenizer: Any) -> None:
    wanted = [parameter.requires_grad for parameter in llama.parameters()]
    before = _log_probabilities(llama, PASSAGES[0])
    mean_log_probability_derivatives(llama, tokenizer, PASSAGES, _placed(edits), _sites(llama))
    assert torch.equal(_log_probabilities(llama, PASSAGES[0]), before)
    assert [parameter.requires_grad for parameter in llama.parameters()] == wanted
    assert all(parameter.grad is None for parameter in llama.parameters())
    assert our_hooks(llama) == 0
