from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sealign
from sealign.demonstrations.bundled import neutral_texts
from sealign.errors import SettingError
from sealign.evaluation.damage import (
    Damage,
    measure_damage,
    measure_damages,
    measure_passages,
)
from sealign.evaluation.evaluate_edits import evaluate
from sealign.evaluation.evaluation_config import EvaluationConfig
from sealign.evaluation.increase import increase_interval, increase_with_bound
from sealign.evaluation.strength_choice import DamageTexts
from sealign.models.passages import Passage
from tests.tiny_models import build_model

TEXTS = [
    "The town lies by the river.",
    "The clerk at the counter asks for a form, and then for another.",
    "Bread is baked.",
]


@torch.no_grad()
def test_against_plain_losses(llama: Any, tokenizer: Any, small_edit: sealign.Edit) -> None:
    damage = measure_damage(llama, tokenizer, small_edit, texts=TEXTS, batch_size=2)
    base, edited, divergences, counts = [], [], [], []
    for text in TEXTS:
        ids = torch.tensor([tokenizer.encode(text)])
        counts.append(ids.shape[1] - 1)
        plain = llama(ids, labels=ids)
        with sealign.apply_edit(llama, small_edit):
            changed = llama(ids, labels=ids)
        base.append(float(plain.loss))
        edited.append(float(changed.loss))
        logs = [torch.log_softmax(output.logits[0, :-1].double(), -1) for output in (plain, changed)]
        divergences.append(
            float(torch.nn.functional.kl_div(logs[1], logs[0], log_target=True, reduction="none").sum(-1).mean())
        )
    np.testing.assert_allclose(damage.base, base, rtol=1e-4)
    np.testing.assert_allclose(damage.edited, edited, rtol=1e-4)
    np.testing.assert_allclose(damage.divergence, divergences, rtol=1e-2, atol=1e-5)
    assert damage.tokens.tolist() == counts
    assert damage.loss_increase == pytest.approx(np.dot(np.subtract(edited, base), counts) / sum(counts), rel=1e-2)
    assert damage.mean_divergence > 0


def test_several_edits_are_measured_separately(llama: Any, tokenizer: Any, small_edit: sealign.Edit) -> None:
    edits = [small_edit, small_edit.with_layers([1]), small_edit.randomized(0)]
    together = measure_damages(llama, tokenizer, edits, texts=TEXTS)
    for edit, found in zip(edits, together, strict=True):
        alone = measure_damage(llama, tokenizer, edit, texts=TEXTS)
        np.testing.assert_allclose(found.edited, alone.edited)
        np.testing.assert_allclose(found.base, alone.base)
    assert len({round(found.edited_loss, 6) for found in together}) == 3


@pytest.mark.parametrize(("texts", "count"), [(["Bread is baked."], 1), (["Bread is baked.", ""], 1), ([], 0)])
def test_too_few_texts_for_an_interval(
    llama: Any, tokenizer: Any, small_edit: sealign.Edit, texts: list[str], count: int, tmp_path: Path
) -> None:
    """Wherever damage is measured, before anything is scored."""
    words = rf"damage is measured on {count} texts? of 2 tokens or more, but its interval needs at least 2; give more"
    with pytest.raises(SettingError, match=words):
        measure_damage(llama, tokenizer, small_edit, texts=texts)
    demonstrations = sealign.load_demonstrations("bundled:fairness", limit=4)
    with pytest.raises(SettingError, match="damage is measured on 0 texts"):  # shorter than a passage
        DamageTexts.of(llama, tokenizer, demonstrations, texts=texts)
    config = EvaluationConfig(demonstrations=demonstrations, neutral_texts=texts)
    with pytest.raises(SettingError, match=words):
        evaluate(llama, tokenizer, {"mild": small_edit}, config=config, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_strength_0_does_no_damage(llama: Any, tokenizer: Any, small_edit: sealign.Edit) -> None:
    damage = measure_damage(llama, tokenizer, small_edit.with_strength(0.0), texts=TEXTS)
    assert damage.loss_increase == 0
    assert damage.mean_divergence == pytest.approx(0, abs=1e-9)


def test_per_feature_edits_run_one_text_at_a_time(llama: Any, tokenizer: Any, small_edit: sealign.Edit) -> None:
    edit = small_edit.with_normalization("feature")
    assert measure_damage(llama, tokenizer, edit, texts=TEXTS, batch_size=3).loss_increase != 0


def test_the_bound_on_the_damage_covers() -> None:
    """The bound is above the true increase in 95 of 100 draws of texts."""
    generator = np.random.default_rng(0)
    above = []
    for _ in range(2000):
        tokens = np.full(10, 40.0)
        increases = generator.normal(0.05, 0.04, 10)
        mean, bound = increase_with_bound(tokens, np.zeros(10), increases)
        assert mean == pytest.approx(increases.mean())
        above.append(bound >= 0.05)
    assert 0.94 <= np.mean(above) <= 0.96
    mean, _ = increase_with_bound(np.array([1.0, 3.0]), np.zeros(2), np.array([1.0, 0.0]))
    assert mean == 0.25


def test_the_interval_of_the_damage_covers_and_a_divergence_is_not_negative() -> None:
    """The interval has the true increase in 95 of 100 draws of texts."""
    generator = np.random.default_rng(1)
    tokens, covered = np.full(10, 40.0), []
    for _ in range(2000):
        low, high = increase_interval(tokens, np.zeros(10), generator.normal(0.05, 0.04, 10))
        covered.append(low <= 0.05 <= high)
    assert 0.94 <= np.mean(covered) <= 0.96
    damage = Damage(np.array([2.0, 2.0]), np.array([1.0, 1.0]), np.array([1.5, 1.0]), np.array([0.0, 0.2]))
    reach = 12.706205 * 0.25  # t with one degree of freedom, times the standard error of the increase
    assert damage.loss_interval == pytest.approx((0.25 - reach, 0.25 + reach))
    assert damage.divergence_interval == pytest.approx((0.0, 0.1 + 12.706205 * 0.1))


@pytest.mark.slow
def test_a_strong_edit_does_much_more_damage_than_a_mild_one(smollm2: Any) -> None:
    """A strong edit of many layers may score higher on MC2, but its damage shows that it breaks the model."""
    model, tokenizer = smollm2
    demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=24)
    config = sealign.SEAConfig(explained_variance=0.9, centered=True)
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=config)
    texts = neutral_texts()[:2]
    strong, mild = measure_damages(model, tokenizer, [edit, edit.with_strength(0.25)], texts=texts)
    assert 2.5 < strong.base_loss < 4.5
    assert strong.loss_increase > 3 * max(mild.loss_increase, 0.01)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral"])
def test_passages_with_a_common_beginning(name: str, tokenizer: Any, demonstrations: Any) -> None:
    """The beginning runs once for all passages, which each get what they get alone."""
    model = build_model(name, vocab_size=len(tokenizer))
    config = sealign.MeanDifferenceConfig(site="mlp", layers=[1])
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=config)
    begin = tuple(range(10, 22))
    passages = [Passage((*begin, 5, 9, 2, 7), 13), Passage((*begin, 4, 8, 6), 12), Passage((*begin, 5, 1, 3, 3, 9), 14)]
    (together,) = measure_passages(model, tokenizer, [edit], passages, batch_size=3)
    (alone,) = measure_passages(model, tokenizer, [edit], passages, batch_size=1)
    for own, expected in ((together.edited, alone.edited), (together.divergence, alone.divergence)):
        np.testing.assert_allclose(own, expected, atol=1e-5)
    assert together.tokens.tolist() == [3, 3, 3]
    assert alone.divergence.min() > 1e-5
