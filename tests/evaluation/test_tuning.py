"""Tuning: the space, the split, the budget, resuming; on a tiny model and local data."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from sealign.evaluation.search_space import SearchSpace
from sealign.evaluation.trials import TrialRecord, best_trial, trial_config

import sealign
from sealign.errors import SettingError
from sealign.evaluation.item_scores import ItemScores
from sealign.evaluation.tuning import mean_gain, tune
from sealign.evaluation.tuning_config import TuneConfig
from tests.conftest import our_hooks
from tests.evaluation_data import HARNESS_WARNINGS, write_truthfulqa
from tests.tiny_models import build_model

pytestmark = HARNESS_WARNINGS


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_truthfulqa(folder, count=16)
    return folder


@pytest.fixture
def config(local: Path) -> TuneConfig:
    fit = sealign.SEAConfig(batch_size=4)
    return TuneConfig(tasks=["truthfulqa_mc2"], data_dir=local, max_damage=0.1, trials=6, seed=1, fit=fit)


@pytest.mark.slow
def test_the_winner_is_tested_on_held_out_items(
    llama: Any, tokenizer: Any, demonstrations: Any, config: TuneConfig, tmp_path: Path
) -> None:
    result = tune(llama, tokenizer, demonstrations, config=config, output=tmp_path, command="as typed")
    assert len(result.trials) == 6
    assert our_hooks(llama) == 0
    measured = [trial for trial in result.trials if trial.damage is not None]
    assert measured
    for trial in measured:
        assert trial.damage_bound is not None
        assert trial.damage_bound <= config.max_damage  # the strength is found for the budget
    with (tmp_path / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["number"]) for row in rows] == [trial.number for trial in result.trials]
    assert result.winner is not None, "with this seed a setting gains; choose another if the space has changed"
    assert result.edit is not None
    assert result.results is not None
    assert result.report is not None
    assert sealign.Edit.from_pretrained(tmp_path / "edit").hash == result.edit.hash
    # Fitted anew from its settings, the winner is the same edit.
    again = trial_config(config.fit, result.winner).replace(strength=result.winner.strength)
    fitted = sealign.fit_edit(llama, tokenizer, demonstrations, config=again)
    assert fitted.layers == result.edit.layers
    assert fitted.hash == result.edit.hash
    tested = result.results.tasks["truthfulqa_mc2"]
    assert len(tested.questions) == 8
    assert list(result.results.arms) == [
        "base", "winner", "winner random 0", "winner random 1", "winner random 2", "winner reversed",
    ]  # fmt: skip
    assert result.report.verdict.word in ("helps", "no evidence", "harms")

    # The same call goes on: nothing left to try, and the same result.
    more = tune(llama, tokenizer, demonstrations, config=config, output=tmp_path, command="as typed")
    assert more.trials == result.trials
    longer = config.replace(trials=7)
    with pytest.raises(SettingError, match="study of a search with other settings"):
        tune(llama, tokenizer, demonstrations[:-1], config=longer, output=tmp_path)


@pytest.mark.slow
def test_the_split_holds_for_every_task(
    llama: Any, tokenizer: Any, demonstrations: Any, local: Path, tmp_path: Path
) -> None:
    from sealign.evaluation.local_tasks import task_manager
    from sealign.evaluation.tuning import _Search
    from sealign.progress import no_progress

    config = TuneConfig(tasks=["truthfulqa_mc1", "truthfulqa_mc2"], data_dir=local, limit=13, development_fraction=0.6)
    with task_manager(config.tasks, config.data_dir) as manager:
        search = _Search(llama, tokenizer, demonstrations, config, manager, tmp_path, no_progress)
    for task in config.tasks:
        development = [number for chunk in search.chunks for number in chunk[task]]
        assert len(development) == 8
        assert sorted(development + search.test_items[task]) == list(range(13))
    assert not set(search.development_texts) & set(search.test_texts)
    few = config.replace(limit=5)
    with task_manager(config.tasks, config.data_dir) as manager, pytest.raises(SettingError, match="has 5 items, but"):
        _Search(llama, tokenizer, demonstrations, few, manager, tmp_path, no_progress)


def test_deployable_edits_are_those_that_weights_carry() -> None:
    llama, opt = build_model("llama", vocab_size=50), build_model("opt", vocab_size=50)
    for model, centerable in ((llama, {"mlp", "attention"}), (opt, set())):
        space = SearchSpace.of(model, sealign.SEAConfig(), deployable=True)
        assert set(space.centerable) == centerable
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for _ in range(40):
            drawn, share = space.draw(study.ask(), sealign.SEAConfig())
            assert isinstance(drawn, sealign.SEAConfig)
            assert drawn.site in ("mlp", "attention")
            assert drawn.normalization == "none"
            assert drawn.feature_map == "identity"
            assert not drawn.centered or drawn.site in centerable
            assert 0.5 <= share <= 1


def test_the_whole_space_is_drawn() -> None:
    model = build_model("llama", vocab_size=50)
    space = SearchSpace.of(model, sealign.SEAConfig())
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn: list[Any] = [space.draw(study.ask(), sealign.SEAConfig(batch_size=3))[0] for _ in range(150)]
    assert {config.site for config in drawn} == {"mlp", "attention", "residual"}
    assert {config.feature_map for config in drawn} == {"identity", "squared_exponential", "tanh", "elu"}
    assert {config.normalization for config in drawn} == {"token", "none"}
    assert {config.centered for config in drawn} == {True, False}
    assert {config.batch_size for config in drawn} == {3}
    windows = [config.layers for config in drawn if not isinstance(config.layers, str)]
    assert all(list(window) == list(range(window[0], window[-1] + 1)) for window in windows)
    assert {window[-1] for window in windows} == set(range(space.depth))
    assert any(isinstance(config.layers, str) for config in drawn)


def test_a_method_is_searched_over_the_settings_that_it_has() -> None:
    base = sealign.MeanDifferenceConfig(token="mean")
    space = SearchSpace.of(build_model("llama", vocab_size=50), base)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = []
    for number in range(40):
        trial = study.ask()
        config, _ = space.draw(trial, base)
        assert not {"feature_map", "combine", "centered", "left_out_positive"} & set(trial.params)
        record = dataclasses.replace(_trial(number, "complete", 0.1, 0.01), settings=config.dump())
        assert trial_config(base, record) == config
        drawn.append(config)
    assert {config.site for config in drawn} == {"mlp", "attention", "residual"}
    assert {config.token for config in drawn} == {"mean"}


def _trial(number: int, state: str, gain: float | None, damage: float | None) -> TrialRecord:
    bound = None if damage is None else 1.2 * damage
    return TrialRecord(
        number=number, state=state, gain=gain, damage=damage, damage_bound=bound, strength=0.5, settings={}
    )


def test_the_winner_is_complete_within_budget_and_gains() -> None:
    trials = [
        _trial(0, "complete", 0.01, 0.02),
        _trial(1, "complete", 0.03, 0.045),  # within the budget, but its bound is not
        _trial(2, "pruned", 0.05, 0.02),
        _trial(3, "complete", 0.02, 0.04),
        _trial(4, "failed", None, None),
    ]
    winner = best_trial(trials, 0.05)
    assert winner is not None
    assert winner.number == 3
    assert best_trial([_trial(0, "complete", -0.01, 0.0), _trial(1, "complete", 0.0, 0.0)], 0.05) is None


def test_gains_are_over_all_parts_and_the_mean_over_tasks() -> None:
    def part(values: list[float], aim: Any = "higher") -> ItemScores:
        return ItemScores(np.arange(len(values)), np.array(values), aim=aim)

    base = [{"a": part([0.0, 1.0]), "b": part([0.9], 0.5)}, {"a": part([0.0])}]
    edited = [{"a": part([1.0, 1.0]), "b": part([0.6], 0.5)}, {"a": part([1.0])}]
    assert mean_gain(base, edited) == pytest.approx((2 / 3 + 0.3) / 2)


def test_bounds() -> None:
    for changed, words in (
        ({"max_damage": 0.0}, "max_damage is 0.0, but it must be above 0"),
        ({"development_fraction": 1.0}, "development_fraction is 1.0"),
        ({"trials": 0}, "trials is 0"),
        ({"tasks": []}, "tasks is empty"),
    ):
        with pytest.raises(SettingError, match=words):
            TuneConfig(**({"tasks": ["bbq"]} | changed))  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="fit is LEACEConfig.*must be a SEAConfig or a MeanDifferenceConfig"):
        TuneConfig(tasks=["bbq"], fit=sealign.LEACEConfig())  # type: ignore[arg-type]
