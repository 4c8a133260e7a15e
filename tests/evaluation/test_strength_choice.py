"""The choice of a strength: both kinds of damage are within the budget, and little of it is left."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import sealign
from sealign.errors import ModelError, SettingError
from sealign.evaluation.damage import Damage
from sealign.evaluation.strength_choice import DamageBudget, DamageTexts, choose_strength, growth
from tests.tiny_models import build_model

BUDGET = DamageBudget(0.05)


def _damage(loss: list[float], divergence: list[float]) -> Damage:
    base = np.linspace(3.0, 4.0, len(loss))
    return Damage(np.full(len(loss), 40.0), base, base + np.array(loss), np.array(divergence))


class FakeTexts(DamageTexts):
    """Texts on which damage is a known function of the strength, and measurements are counted."""

    def __init__(self, slope: float, curvature: float, own: float, spread: float = 0.0) -> None:
        super().__init__([], [])
        given = {"slope": slope, "curvature": curvature, "own": own, "spread": spread, "tried": []}
        for name, value in given.items():
            object.__setattr__(self, name, value)

    def part(self) -> FakeTexts:
        return self

    def at(self, s: float) -> tuple[Damage, Damage]:
        wave: Any = self
        noise = [wave.spread * (-1) ** number for number in range(24)]
        divergence = [wave.curvature * s**2] * 24
        loss = [wave.slope * s * (1 + each) + wave.curvature * s**2 for each in noise]
        return _damage(loss, divergence), _damage([5.0 * s] * 6, [wave.own * s**2] * 6)

    def measure(
        self, model: Any, tokenizer: Any, edits: Any, *, journal: Any = None, track: Any = None
    ) -> list[tuple[Damage, Damage | None]]:
        del model, tokenizer, journal, track
        wave: Any = self
        wave.tried.append(edits[0].strength)
        return [self.at(edit.strength) for edit in edits]


@pytest.mark.parametrize(
    ("slope", "curvature", "own"),
    [(0.0, 2.0, 1.0), (3.0, 2.0, 1.0), (30.0, 0.5, 0.1), (-1.0, 2.0, 0.5), (0.1, 0.2, 40.0)],
)
@pytest.mark.parametrize("spread", [0.0, 0.4])
def test_loss_and_divergence_are_within_the_budget(
    slope: float, curvature: float, own: float, spread: float, llama: Any, tokenizer: Any, small_edit: sealign.Edit
) -> None:
    texts = FakeTexts(slope, curvature, own, spread)
    choice = choose_strength(llama, tokenizer, small_edit, texts, budget=BUDGET)
    neutral, domain = texts.at(choice.strength)
    figures = neutral.loss_bound, neutral.divergence_bound, domain.divergence_bound
    assert max(figures) <= 0.05
    neutral, domain = texts.at(1.25 * choice.strength)
    assert max(neutral.loss_bound, neutral.divergence_bound, domain.divergence_bound) > 0.05
    wave: Any = texts
    assert len(wave.tried) <= 6


def test_a_loss_that_rises_alone_limits_the_strength(llama: Any, tokenizer: Any, small_edit: sealign.Edit) -> None:
    """The divergence of a small strength says nothing of it, since the base model is not the author of the text."""
    mild = choose_strength(llama, tokenizer, small_edit, FakeTexts(3.0, 2.0, 1.0), budget=BUDGET).strength
    free = choose_strength(llama, tokenizer, small_edit, FakeTexts(0.0, 2.0, 1.0), budget=BUDGET).strength
    assert mild == pytest.approx(0.0164, rel=0.25)
    assert free == pytest.approx(0.158, rel=0.25)


def test_room() -> None:
    neutral, domain = _damage([0.02, 0.03], [0.0125, 0.0125]), _damage([0.9, 0.9], [0.01, 0.01])
    # loss 0.0125 f + 0.0125 f^2 = 0.05
    assert BUDGET.room(neutral, domain) == pytest.approx(1.5615528)
    assert DamageBudget(0.05, 0.0025).room(neutral, domain) == pytest.approx(0.5)
    assert BUDGET.room(neutral, domain, bounds=True) < 1.5
    assert BUDGET.room(_damage([-0.01, -0.01], [0.0125, 0.0125]), None) == pytest.approx(2.0)
    for broken in (math.nan, math.inf):
        assert BUDGET.room(_damage([broken, 0.0], [0.0, 0.0]), domain) == 0
        assert BUDGET.room(neutral, _damage([0.0, 0.0], [broken, 0.0])) == 0


@pytest.mark.parametrize("slope", [-2.0, 0.0, 0.3])
@pytest.mark.parametrize("curvature", [0.02, 4.0])
def test_growth_solves_its_equation(slope: float, curvature: float) -> None:
    factor = growth(0.05, slope, curvature)
    assert factor > 0
    assert slope * factor + curvature * factor**2 == pytest.approx(0.05)


def test_growth_without_curvature() -> None:
    assert growth(0.05, 0.1, 0.0) == pytest.approx(0.5)
    assert growth(0.05, 0.0, 0.0) == growth(0.05, -1.0, 0.0) == math.inf


def test_a_real_edit_is_within_the_budget(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    edit = sealign.fit_edit(
        llama, tokenizer, demonstrations, config=sealign.MeanDifferenceConfig(site="residual", layers=[1])
    )
    texts = DamageTexts.of(llama, tokenizer, demonstrations)
    assert len(texts.part().neutral) == len(texts.neutral) / 3
    choice = choose_strength(llama, tokenizer, edit, texts, budget=DamageBudget(0.01))
    ((neutral, domain),) = texts.measure(llama, tokenizer, [edit.with_strength(choice.strength)])
    assert neutral.loss_increase == pytest.approx(choice.neutral.loss_increase, abs=1e-6)
    assert domain is not None
    figures = neutral.loss_bound, neutral.divergence_bound, domain.divergence_bound
    assert 0.005 < max(figures) <= 0.01
    limited = choose_strength(llama, tokenizer, edit, texts, budget=DamageBudget(0.01), limit=choice.strength / 3)
    assert limited.strength == choice.strength / 3


def test_a_base_model_that_gives_nan_is_refused(tokenizer: Any, demonstrations: Any, small_edit: Any) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    texts = DamageTexts(DamageTexts.of(model, tokenizer, demonstrations).neutral, [])
    model.lm_head.register_forward_hook(lambda _m, _i, out: out * math.nan)
    with pytest.raises(ModelError, match="the loss of the base model on neutral text is nan, so no damage can be meas"):
        choose_strength(model, tokenizer, small_edit, texts, budget=DamageBudget(0.01))


def test_settings_are_checked(llama: Any, tokenizer: Any, small_edit: sealign.Edit) -> None:
    with pytest.raises(SettingError, match="max_damage is 0, but it must be above 0"):
        DamageBudget(0)
    with pytest.raises(SettingError, match="limit is 0, but it must be above 0"):
        choose_strength(llama, tokenizer, small_edit, FakeTexts(0, 1, 1), limit=0)
