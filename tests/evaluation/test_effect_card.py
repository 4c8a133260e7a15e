from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import sealign
from sealign.demonstrations.bundled import neutral_texts
from sealign.evaluation.comparison import report_edits
from sealign.evaluation.effect_card import effect_text, write_effects
from sealign.evaluation.evaluate_edits import evaluate
from sealign.evaluation.evaluation_config import EvaluationConfig
from sealign.evaluation.results import Results
from tests.evaluation_data import HARNESS_WARNINGS

pytestmark = HARNESS_WARNINGS


@pytest.fixture
def saved(small_edit: sealign.Edit, tmp_path: Path) -> Path:
    small_edit.save_pretrained(tmp_path / "edit")
    return tmp_path / "edit"


@pytest.fixture
def results(
    llama: Any, tokenizer: Any, saved: Path, small_edit: sealign.Edit, demonstrations: Any, tmp_path: Path
) -> Results:
    """An evaluation of a saved edit, of the same one at another strength, and of one that was not saved."""
    edits = {"mild": small_edit, "strong": small_edit.with_strength(1.5), "made": small_edit.reversed()}
    config = EvaluationConfig(demonstrations=demonstrations, control_seeds=(0,), neutral_texts=neutral_texts()[:2])
    sources = {"mild": str(saved), "strong": str(shutil.copytree(saved, tmp_path / "strong"))}
    return evaluate(llama, tokenizer, edits, config=config, output=tmp_path / "out", sources=sources)


def test_the_cards_of_what_was_evaluated_show_it(results: Results, saved: Path, tmp_path: Path) -> None:
    reports = report_edits(results)
    before = sealign.load_edit(saved).hash
    assert write_effects(results, reports) == [saved / "README.md", tmp_path / "strong" / "README.md"]
    assert sealign.load_edit(saved).hash == before
    card = (saved / "README.md").read_text()
    assert "Not evaluated" not in card
    assert f"**{reports[0].verdict.sentence}**\n" in card
    row = reports[0].headlines[0]
    assert row.difference is not None
    interval = f"{row.difference.difference:+.3f} [{row.difference.low:+.3f}, {row.difference.high:+.3f}]"
    assert f"| {row.base:.3f} | {row.edited:.3f} | {interval} |" in card
    assert f"{reports[0].damage['mild'].loss_increase:+.4f} nats per token" in card
    assert "instead of the edit's own" not in card
    strong = (tmp_path / "strong" / "README.md").read_text()
    assert f"**{reports[1].verdict.sentence}** At strength 1.5 instead of the edit's own 0.7." in strong
    assert write_effects(results, reports) == []  # nothing is new


def test_an_edit_that_has_changed_is_left_out(
    results: Results, saved: Path, small_edit: sealign.Edit, tmp_path: Path
) -> None:
    small_edit.reversed().save_pretrained(saved, overwrite=True)
    (tmp_path / "strong" / "README.md").unlink()
    assert write_effects(results, report_edits(results)) == []
    assert "Not evaluated" in (saved / "README.md").read_text()


def test_a_broken_edit(results: Results) -> None:
    for metric in results.tasks["preference"].metrics.values():
        metric.arms["mild"].numerators[0] = None
    (report, *_) = report_edits(results)
    text = effect_text(results, report, own_strength=0.7)
    assert text.startswith(f"**{report.verdict.sentence}**")
    assert "| not known |" in text
    assert "nan" not in text
