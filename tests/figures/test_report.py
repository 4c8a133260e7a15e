"""The report: its text, its figures, and its behaviour in a browser."""

from __future__ import annotations

import base64
import csv
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from sealign.errors import EditFileError
from sealign.evaluation.comparison import report_edits
from sealign.evaluation.results import Results
from sealign.figures.report import changed_items, write_report
from sealign.folders import new_folder
from tests.evaluation_data import planted_results, planted_sweep, with_answers

SECTIONS = ["verdicts", "answers", "table", "differences", "categories", "changes", "damage", "provenance"]


@pytest.fixture(scope="module")
def results() -> Results:
    return with_answers(planted_results(0.05))


@pytest.fixture(scope="module")
def folder(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "out"
    write_report(results, report_edits(results), path)
    return path


def test_files(folder: Path) -> None:
    assert {entry.name for entry in folder.iterdir()} == {"report.html", "table.csv", "figures"}
    figures = {entry.name for entry in (folder / "figures").iterdir()}
    names = {"mild-differences", "mild-damage", "mild-bbq-acc", "mild-gain-damage", "mild-gain-own-answers"}
    assert figures == {f"{name}.{kind}" for name in names for kind in ("pdf", "png")} | {"sealign.json"}


def test_figures_of_an_earlier_report_do_not_stay(results: Results, tmp_path: Path) -> None:
    with new_folder(tmp_path / "figures") as earlier:
        (earlier / "other-damage.png").write_bytes(b"")
    write_report(results, report_edits(results), tmp_path)
    assert not (tmp_path / "figures" / "other-damage.png").exists()
    (tmp_path / "mine" / "figures").mkdir(parents=True)
    (tmp_path / "mine" / "figures" / "photo.png").write_bytes(b"")
    with pytest.raises(EditFileError, match="figures' is not empty and has no sealign.json"):
        write_report(results, report_edits(results), tmp_path / "mine")


def test_the_page_is_self_contained_and_the_same_twice(results: Results, folder: Path, tmp_path: Path) -> None:
    page = (folder / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert "<script" not in page
    assert "http" not in re.sub(r"data:[^\"']*", "", page)
    write_report(results, report_edits(results), tmp_path)
    assert (tmp_path / "report.html").read_text() == page


def test_the_page_shows_everything(results: Results, folder: Path) -> None:
    page = (folder / "report.html").read_text()
    (report,) = report_edits(results)
    assert report.verdict.sentence in page
    assert page.index("Helps") < page.index("<table")
    assert "tiny &lt;model&gt;" in page
    assert "tiny <model>" not in page
    assert results.command.replace("'", "&#39;") in page
    assert "Something was left out" in page
    assert "<td>sea</td><td>edits/mild</td><td>0.5</td>" in page
    assert "too few items for an interval" in page
    for row in report.headlines:
        assert row.difference is not None
        assert f"{row.difference.difference:+.3f}" in page
    for section in SECTIONS:
        assert f'<section id="{section}"' in page


def test_the_page_opens_with_verdict_gain_and_ten_answers(results: Results, folder: Path) -> None:
    page = (folder / "report.html").read_text()
    (report,) = report_edits(results)
    opening = page[page.index('<section id="verdicts"') : page.index('<section id="table"')]
    places = [
        opening.index(text) for text in (report.verdict.sentence, "Gain against", "&lt;open&gt; answer 0 of base")
    ]
    assert places == sorted(places)
    assert opening.count("<img") == 2
    assert "KL divergence on the base model&#39;s own answers" in opening
    shown, more = opening.split("2 more prompts")
    for number in range(12):
        part = shown if number < 10 else more
        assert part.index(f"open question {number}?") < part.index(f"answer {number} of base<")
        assert part.index(f"answer {number} of base<") < part.index(f"answer {number} of mild<")
        assert f"answer {number} of mild reversed<" in part
    assert "<open>" not in page
    table = page[page.index('<section id="table"') :]
    assert table.index("answers mood") < table.index("answers loss") < table.index("other metrics and subgroups")


def test_a_page_without_answers_says_how_to_get_them(tmp_path: Path) -> None:
    plain = planted_results(0.05)
    write_report(plain, report_edits(plain), tmp_path)
    assert "No prompts were answered" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "figures" / "mild-gain-own-answers.png").exists()


def test_an_edit_that_a_search_found_brings_its_layer_map(tmp_path: Path) -> None:
    results = planted_results(0.05)
    (tmp_path / "tuned" / "figures").mkdir(parents=True)
    (tmp_path / "tuned" / "figures" / "layer_map.png").write_bytes(b"a picture")
    found = dataclasses.replace(results.arms["mild"], source=str(tmp_path / "tuned" / "edit"))
    tuned = dataclasses.replace(results, arms=results.arms | {"mild": found})
    picture = base64.b64encode(b"a picture").decode()
    write_report(tuned, report_edits(tuned), tmp_path / "out")
    assert picture not in (tmp_path / "out" / "report.html").read_text()  # the folder has no scan
    (tmp_path / "tuned" / "scan.csv").write_text("")
    write_report(tuned, report_edits(tuned), tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.index("Gain against") < page.index(f"data:image/png;base64,{picture}") < page.index('id="answers"')


def test_several_strengths_have_one_opening(tmp_path: Path) -> None:
    swept = planted_sweep((1.0, 0.5))
    reports = report_edits(swept)
    write_report(swept, reports, tmp_path)
    page = (tmp_path / "report.html").read_text()
    opening = page[page.index('<section id="verdicts"') : page.index('<section id="answers"')]
    assert opening.count("<img") == 3
    assert "Differences from the base model against the strength" in opening
    for report in reports:
        assert f"<strong>{report.edit}</strong>{report.verdict.sentence}" in opening
    assert {"mild-sweep.png", "mild-gain-damage.pdf"} <= {path.name for path in (tmp_path / "figures").iterdir()}


def test_the_table_as_csv(results: Results, folder: Path) -> None:
    (report,) = report_edits(results)
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["metric"] for row in rows] == [row.metric for row in report.rows]
    first, row = rows[0], report.rows[0]
    assert row.difference is not None
    assert row.random is not None
    assert float(first["difference"]) == row.difference.difference
    assert float(first["random_difference"]) == row.random.difference
    assert float(first["adjusted_p"]) == row.adjusted_p
    (religion,) = [row for row in rows if row["metric"] == "acc/Religion"]
    assert religion["difference"] == ""


def test_items_that_changed_most_both_ways(results: Results) -> None:
    (report,) = report_edits(results)
    mc2, accuracy, bias, _ = report.headlines
    changes = changed_items(results, report, accuracy, count=3)
    assert [change.change for change in changes] == [1.0, 1.0, 1.0, -1.0, -1.0, -1.0]
    metric = results.tasks["truthfulqa_mc2"].metrics["mc2"]
    change = changed_items(results, report, mc2, count=1)[0]
    gains = (metric.item_scores("mild").numerators - metric.item_scores("base").numerators).tolist()
    assert change.change == max(gains)
    item = gains.index(max(gains))
    assert change.question == f"question {item}"
    assert (change.base, change.edited) == (f"answer {item} of base", f"answer {item} of mild")
    assert changed_items(results, report, bias) == []  # items of a ratio have no scores


def test_a_lower_score_is_a_gain_if_the_aim_is_lower(results: Results) -> None:
    task = results.tasks["truthfulqa_mc2"]
    lower = {"mc2": dataclasses.replace(task.metrics["mc2"], aim="lower")}
    turned = dataclasses.replace(results, tasks={"truthfulqa_mc2": dataclasses.replace(task, metrics=lower)})
    (report,) = report_edits(turned)
    assert report.verdict.word == "harms"
    assert changed_items(turned, report, report.headlines[0], count=1)[0].change < 0


def test_the_base_model_alone(results: Results, tmp_path: Path) -> None:
    tasks = {
        name: dataclasses.replace(
            task,
            metrics={
                metric: dataclasses.replace(scores, arms={"base": scores.arms["base"]})
                for metric, scores in task.metrics.items()
            },
        )
        for name, task in results.tasks.items()
    }
    base = {"base": results.arms["base"]}
    alone = dataclasses.replace(results, arms=base, tasks=tasks, damage={}, domain_damage={})
    write_report(alone, report_edits(alone), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "No edit was evaluated" in page
    assert f"{tasks['truthfulqa_mc2'].metrics['mc2'].value('base'):.3f}" in page


def test_scores_and_losses_that_are_not_finite(tmp_path: Path) -> None:
    broken = planted_results(0.05)
    broken.tasks["truthfulqa_mc2"].metrics["mc2"].arms["mild"].numerators[3] = None
    broken.damage["mild"].edited[0] = None
    write_report(broken, report_edits(broken), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Broken: NaN or infinite numbers in truthfulqa_mc2 mc2 and the loss on neutral text." in page
    assert "not finite in 1 item<" in page
    assert "<td>not finite</td>" in page
    assert ">nan" not in page
    assert ">+nan" not in page
    with (tmp_path / "table.csv").open() as file:
        row = next(csv.DictReader(file))
    assert (row["metric"], row["edited"], row["difference"]) == ("mc2", "", "")


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(browser: Any, folder: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 740}, color_scheme=scheme, offline=True)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto((folder / "report.html").as_uri())
    assert page.title() == "Sealign evaluation: tiny <model>"
    # Nothing is wider than the screen: tables scroll within themselves.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Figures of the opening and answers need no scrolling, and their text is not tiny.
    assert page.evaluate("[...document.querySelectorAll('.figures img')].every(e => e.clientWidth >= 300)")
    assert page.evaluate("[...document.querySelectorAll('.item')].every(e => e.scrollWidth <= e.clientWidth)")
    assert page.evaluate("[...document.querySelectorAll('#table .metrics')].every(e => e.scrollWidth <= e.clientWidth)")
    loaded = page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 0)")
    assert len(loaded) == 5
    assert all(loaded)
    # By keyboard alone: each link of the list of sections goes to its section.
    for section in SECTIONS:
        page.evaluate("window.scrollTo(0, 0); document.activeElement.blur()")
        for _ in range(len(SECTIONS)):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.getAttribute('href')") == f"#{section}":
                break
        page.keyboard.press("Enter")
        assert page.evaluate("location.hash") == f"#{section}"
        assert page.evaluate(f"document.activeElement.id === '{section}' || document.querySelector(':target').id") in (
            True,
            section,
        )
        page.goto((folder / "report.html").as_uri())
    # The other rows open with a key.
    page.focus("#table summary")
    page.keyboard.press("Enter")
    assert page.locator("#table details").first.evaluate("element => element.open")
    assert said == []
    context.close()
