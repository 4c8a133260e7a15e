"""Arms: every edit has its controls, whichever method made it, and other methods have none."""

from __future__ import annotations

from typing import Any

import pytest

import sealign
from sealign.configuration import Config
from sealign.errors import SettingError
from sealign.evaluation.arms import PlannedArm, plan_arms

EDITS: dict[str, Config] = {
    "sea": sealign.SEAConfig(rank=2, layers=(1,), strength=0.5),
    "mean_difference": sealign.MeanDifferenceConfig(layers=(2,), strength=0.5),
    "iti": sealign.ITIConfig(heads=2, strength=0.5),
    "leace": sealign.LEACEConfig(layers=(1,), strength=0.5),
}


def _plan(**edits: Any) -> dict[str, PlannedArm]:
    return plan_arms(edits, control_seeds=(0, 4), reversed_control=True, sources={"mild": "a folder"})


@pytest.mark.parametrize("method", EDITS)
def test_every_edit_has_random_and_reversed_controls(
    method: str, llama: Any, tokenizer: Any, demonstrations: Any
) -> None:
    pytest.importorskip("concept_erasure")
    edit = sealign.fit_edit(llama, tokenizer, demonstrations, config=EDITS[method])
    assert isinstance(edit, sealign.Edit)
    arms = _plan(mild=edit)
    assert list(arms) == ["base", "mild", "mild random 0", "mild random 4", "mild reversed"]
    assert [arm.record.kind for arm in arms.values()] == ["base", "edit", "random", "random", "reversed"]
    assert [arm.record.seed for arm in arms.values()] == [None, None, 0, 4, None]
    assert len({arm.record.hash for arm in arms.values()}) == 5
    for name, expected in (("mild random 4", edit.randomized(4)), ("mild reversed", edit.reversed())):
        assert arms[name].record.hash == expected.hash
        found = arms[name].edit
        assert found is not None
        assert found.hash == expected.hash
    for name, arm in arms.items():
        if name != "base":
            assert (arm.record.edit, arm.record.method, arm.record.strength) == ("mild", method, 0.5)
            assert arm.record.layers == edit.layers
            assert arm.record.config == edit.record.config
    assert (arms["mild"].record.source, arms["mild"].record.fit_seconds) == ("a folder", edit.fit_seconds)
    assert arms["mild reversed"].record.source is None
    assert arms["mild reversed"].record.fit_seconds is None


def test_the_strength_is_that_at_which_an_edit_is_applied(small_edit: sealign.Edit) -> None:
    assert _plan(mild=small_edit.with_strength(2.0))["mild reversed"].record.strength == 2.0


def test_methods_without_directions_have_no_controls(llama: Any, tokenizer: Any, small_edit: sealign.Edit) -> None:
    best = sealign.fit_edit(llama, tokenizer, config=sealign.BestOfNConfig(n=3))
    both = sealign.Composition([small_edit, best])
    arms = _plan(best=best, both=both)
    assert list(arms) == ["base", "best", "both"]
    record = arms["both"].record
    assert (record.method, record.strength, record.layers) == ("sea+best_of_n", None, [1, 3])
    assert record.config == {"sea": small_edit.record.config, "best_of_n": best.record.config}
    assert arms["best"].record.config["n"] == 3
    assert arms["best"].record.layers == []


def test_no_two_arms_have_one_name(small_edit: sealign.Edit) -> None:
    for edits, name in (({"base": small_edit}, "base"), ({"a": small_edit, "a reversed": small_edit}, "a reversed")):
        with pytest.raises(SettingError, match=f"an edit is named '{name}', which is the name of another arm"):
            _plan(**edits)


def test_a_sweep_has_an_arm_with_controls_for_each_strength(small_edit: sealign.Edit) -> None:
    arms = plan_arms(
        {"mild": small_edit},
        control_seeds=(3,),
        reversed_control=True,
        sources={"mild": "a folder"},
        strengths=(0.25, 2.0),
    )
    names = ["mild at 0.25", "mild at 2"]
    assert list(arms) == ["base", *(f"{name}{kind}" for name in names for kind in ("", " random 3", " reversed"))]
    for name, strength in zip(names, (0.25, 2.0), strict=True):
        edit = small_edit.with_strength(strength)
        for arm, expected in (("", edit), (" random 3", edit.randomized(3)), (" reversed", edit.reversed())):
            record = arms[f"{name}{arm}"].record
            assert record.hash == expected.hash
            assert (record.edit, record.sweep, record.strength) == (name, "mild", strength)
        assert arms[name].record.source == "a folder"
    assert arms["base"].record.sweep is None


def test_a_method_without_strength_has_no_sweep(llama: Any, tokenizer: Any) -> None:
    best = sealign.fit_edit(llama, tokenizer, config=sealign.BestOfNConfig(n=3))
    with pytest.raises(SettingError, match="best_of_n has no strength; leave it out"):
        plan_arms({"best": best}, control_seeds=(), reversed_control=False, sources={}, strengths=(0.5, 1.0))
