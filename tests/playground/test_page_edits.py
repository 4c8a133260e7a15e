"""The part of the page that makes edits, in a browser: fits and searches."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

import sealign
from sealign.edits.model_card import shown_effect
from sealign.playground.application import playground_application
from sealign.playground.offered_edits import OfferedEdits
from sealign.playground.playground import Playground
from sealign.playground.served_playground import NOT_OFFERED, ServedPlayground
from tests.evaluation.planted import planted_demonstrations, planted_model
from tests.evaluation_data import HARNESS_WARNINGS
from tests.hub_stand_in import hub_stand_in
from tests.playground.stub_server import StubServer, running
from tests.playground.test_application import as_lines
from tests.playground.visits import Visitor

pytestmark = [pytest.mark.slow, *HARNESS_WARNINGS]


@dataclass
class Served:
    """A playground that is served, and the folder of its edits."""

    url: str
    folder: Path


@pytest.fixture(scope="module")
def served(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model, folder = planted_model(len(tokenizer)), tmp_path_factory.mktemp("edits")
    items = planted_demonstrations(6)
    shift = sealign.MeanDifferenceConfig(site="residual", layers=(1, 2), strength=2.0)
    edits = {"shift": sealign.fit_edit(model, tokenizer, items, config=shift)}
    offered = OfferedEdits(model, tokenizer, edits, folder=folder)
    application = playground_application(Playground(model, tokenizer, offered, name="tiny model"))
    with running(application) as url:
        yield Served(url, folder)


def test_an_edit_is_fitted_judged_and_saved(browser: Any, served: Served) -> None:
    visitor = Visitor(browser, served.url, width=390)
    page = visitor.page
    page.get_by_text("Fit an edit").press("Enter")
    page.select_option("#fit-method", "mean_difference")
    page.select_option("#fit-source", "text")
    page.set_input_files("#fit-file", {"name": "big.csv", "mimeType": "text/csv", "buffer": b"x" * (2**20 + 1)})
    expect(page.locator("#fit-problem")).to_contain_text(
        "big.csv has 1048577 bytes, more than 1048576; use sealign fit"
    )
    rows = b"prompt,positive\na,b\n"
    page.set_input_files("#fit-file", {"name": "rows.csv", "mimeType": "text/csv", "buffer": rows})
    expect(page.locator("#fit-rows")).to_have_value(rows.decode())
    page.click("#fit")
    expect(page.locator("#fit-problem")).to_contain_text("the text")
    # Stopped, by keyboard.
    page.select_option("#fit-source", "bundled:fairness")
    assert page.locator("#fit-rows").is_hidden()
    page.focus("#fit")
    page.keyboard.press("Enter")
    expect(page.locator("#fit-stage")).to_contain_text(" of ")
    assert page.locator("#fit-progress").is_visible()
    page.focus("#fit-stop")
    page.keyboard.press("Enter")
    expect(page.locator("#fit-stage")).to_have_text("Stopped")
    assert page.locator(".edit").count() == 1
    # And once more, to its end.
    page.fill("#fit-name", "fair")
    page.click("#fit")
    page.locator(".edit").nth(1).wait_for()
    result = page.locator("#fit-result").inner_text()
    assert re.search("^(Helps|No evidence|Harms|Broken)", result), result
    assert re.search(r"edited\s+[+-]\d", result), result
    assert "fair#" in page.locator(".edit").nth(1).inner_text()
    page.get_by_label(re.compile("^Folder to save fair#")).fill("mine")
    page.get_by_role("button", name="Save").click()
    expect(page.locator(".edit").nth(1)).to_contain_text("Saved to ")
    assert sealign.load_edit(served.folder / "mine").method == "mean_difference"
    assert page.locator("#folders option").evaluate_all("all => all.map(one => one.value)") == ["mine"]
    assert visitor.fits()
    # Another page does not have it until it loads it.
    other = Visitor(browser, served.url)
    assert other.page.locator(".edit").count() == 1
    other.close()
    visitor.close()


def test_the_best_edit_is_found(browser: Any, served: Served, tmp_path: Path) -> None:
    visitor = Visitor(browser, served.url, width=390, scheme="dark")
    page = visitor.page
    page.get_by_text("Fit an edit").press("Enter")
    page.select_option("#fit-method", label="find the best")
    page.select_option("#fit-source", "text")
    page.fill("#fit-rows", as_lines(planted_demonstrations(20)))
    for name in ("difference_operator", "targeted_shift", "sea"):
        page.get_by_label(name, exact=True).uncheck()
    page.fill("#search-layers", "1,2")
    page.fill("#fit-name", "best")
    page.focus("#fit")
    page.keyboard.press("Enter")
    page.locator(".edit").nth(1).wait_for()
    result = page.locator("#fit-result").inner_text()
    assert re.search("^(Helps|No evidence|Harms)", result), result
    assert "Winner: mean_difference, " in result
    for name in ("edited", "random directions", "reversed"):
        assert re.search(rf"{name}\s+[+-]\d\.\d{{3}} \[[+-]\d\.\d{{3}}, [+-]\d\.\d{{3}}\]", result), (name, result)
    assert re.search(
        r"Damage on neutral text: loss [+-]\d\.\d{3} \[.*\], KL \d\.\d{3}; KL \d\.\d{3} on the model", result
    )
    # The map: two of four layers were scanned at each of three sites; by mouse and by keyboard.
    cells = page.locator("#fit-map [role=option]")
    assert cells.count() == 6
    assert page.locator("#fit-map .empty").count() == 12
    assert page.locator("#fit-map .winner").count() >= 1
    cells.nth(3).hover()
    detail = page.locator("#fit-map p")
    shown = detail.inner_text()
    assert re.match(r"mean difference, MLP output, layer 2, (completion|last) token: efficiency [+-]\d", shown), shown
    page.focus("#fit-map svg")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")
    assert detail.inner_text().startswith("mean difference, attention output, layer 1, ")
    assert page.locator("#fit-map [aria-selected=true]").get_attribute("aria-label") == detail.inner_text()
    assert visitor.fits()
    page.screenshot(path=tmp_path / "search.png", full_page=True)
    # The edit is switched on at once, answers, and is saved with the effect that was measured.
    edit = page.locator(".edit").nth(1)
    assert edit.get_by_role("checkbox").is_checked()
    visitor.say("What is near the town number 3?")
    assert "best#" in page.locator(".exchange .edited h3").inner_text()
    page.get_by_label(re.compile("^Folder to save best#")).fill("best")
    page.get_by_role("button", name="Save").click()
    expect(edit).to_contain_text("Saved to ")
    card = (served.folder / "best" / "README.md").read_text()
    assert shown_effect(card).startswith("**")
    assert "random directions" in shown_effect(card)
    visitor.close()


def test_a_search_is_stopped_and_refused(browser: Any, served: Served) -> None:
    visitor = Visitor(browser, served.url)
    page = visitor.page
    page.get_by_text("Fit an edit").click()
    page.select_option("#fit-method", label="find the best")
    page.select_option("#fit-source", "text")
    page.fill("#fit-rows", as_lines(planted_demonstrations(24)))
    page.click("#fit")
    page.locator("#fit-map svg rect").first.wait_for(state="attached")
    page.click("#fit-stop")
    expect(page.locator("#fit-stage")).to_have_text("Stopped")
    assert page.locator(".edit").count() == 1
    # The model is free again.
    visitor.say("What is ice?")
    for rows, minutes, words in (
        (planted_demonstrations(5), "10", "each part needs at least 2; give more demonstrations"),
        (planted_demonstrations(24), "0.0001", "max_minutes is 0.0001, but the smallest search takes about"),
        (planted_demonstrations(24), "", "Time limit: "),
    ):
        page.fill("#fit-rows", as_lines(rows))
        page.fill("#search-minutes", minutes)
        page.click("#fit")
        expect(page.locator("#fit-problem")).to_contain_text(words)
        assert page.locator("#fit").is_enabled()
    visitor.close()


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1400, "dark")])
def test_demonstrations_in_a_table(browser: Any, served: Served, width: int, scheme: str, tmp_path: Path) -> None:
    visitor = Visitor(browser, served.url, width=width, scheme=scheme)
    page = visitor.page
    page.get_by_text("Fit an edit").press("Enter")
    page.select_option("#fit-method", "mean_difference")
    rows = page.locator("#table-rows tr")
    assert rows.count() == 3

    def texts() -> list[list[str]]:
        return rows.evaluate_all("all => all.map(row => [...row.querySelectorAll('textarea')].map(one => one.value))")  # type: ignore[no-any-return]

    # By keyboard: along a row by Tab, down a column by Enter, which adds a row at the end.
    page.get_by_label("prompt of row 1", exact=True).focus()
    page.keyboard.type("Is ice cold?")
    page.keyboard.press("Tab")
    page.keyboard.type("Yes,")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("it is.")
    for _ in range(3):
        page.keyboard.press("Enter")
    page.keyboard.type("Yes.")
    assert rows.count() == 4
    assert texts() == [["Is ice cold?", "Yes,\nit is.", ""], ["", "", ""], ["", "", ""], ["", "Yes.", ""]]
    # By mouse.
    page.get_by_label("Delete row 2", exact=True).click()
    page.click("#row-add")
    assert [row[0] for row in texts()] == ["Is ice cold?", "", "", ""]
    # An error marks its row, after the rows without any text are gone.
    page.click("#fit")
    expect(page.locator("#fit-problem")).to_have_text(
        "Error: row 1: 'negative' is '', but it must be a non-empty string"
    )
    assert rows.count() == 2
    assert page.locator("#table-rows .wrong .number").inner_text() == "1"
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "negative of row 1"
    page.keyboard.type("No.")
    assert page.locator("#table-rows .wrong").count() == 0
    # Rows of a spreadsheet, with their header, from a cell on; other text goes into the cell.
    copied = [
        "prompt\tpositive\tnegative",
        'Is snow cold?\t"Yes, ""snow""\nis."\tNo.\textra',
        "Is fog warm?\tNo.\tYes.",
    ]

    def paste(text: str) -> None:
        page.evaluate(
            """text => {
                const data = new DataTransfer();
                data.setData("text/plain", text);
                const event = new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true });
                if (document.activeElement.dispatchEvent(event)) document.execCommand("insertText", false, text);
            }""",
            text,
        )

    page.get_by_label("prompt of row 2", exact=True).focus()
    paste("\r\n".join(copied) + "\r\n")
    assert texts()[1:] == [["Is snow cold?", 'Yes, "snow"\nis.', "No."], ["Is fog warm?", "No.", "Yes."]]
    page.get_by_label("prompt of row 3", exact=True).fill("")
    paste("Is fog\nwarm?")
    assert texts()[2] == ["Is fog\nwarm?", "No.", "Yes."]
    assert visitor.fits()
    page.screenshot(path=tmp_path / "table.png", full_page=True)
    # Rows below the last one are added, and all are fitted.
    page.get_by_label("prompt of row 3", exact=True).focus()
    paste("\n".join(f"{item.prompt}\t{item.positive}\t{item.negative}" for item in planted_demonstrations(11)))
    assert rows.count() == 13
    assert texts()[12][0] == "What is near the town number 10?"
    page.click("#fit")
    page.locator(".edit").nth(1).wait_for()
    assert page.locator("#fit-problem").inner_text() == ""
    visitor.close()


@pytest.mark.parametrize(("width", "scheme"), [(1400, "dark"), (390, "light")])
def test_an_edit_is_downloaded_and_pushed(
    browser: Any,
    served: Served,
    width: int,
    scheme: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    visitor = Visitor(browser, served.url, width=width, scheme=scheme)
    page = visitor.page
    edit = page.locator(".edit").first
    page.get_by_label("Strength of shift", exact=True).fill("1.5")
    edit.get_by_text("Download", exact=True).press("Enter")
    # The buttons of forms that cannot hold the edit are off, and described by the reason.
    expect(edit).to_contain_text("LoRA: the edit acts on the residual stream, ")
    lora = edit.get_by_role("button", name="LoRA", exact=True)
    assert lora.is_disabled()
    reason = page.locator(f"#{lora.get_attribute('aria-describedby')}").inner_text()
    assert re.fullmatch(r"LoRA: [^\n]+\.", reason), reason
    with page.expect_download() as started:
        edit.get_by_role("button", name="Control vector").click()
    assert started.value.suggested_filename == "shift-control-vector.gguf"
    with page.expect_download() as started:
        edit.get_by_role("button", name="Edit", exact=True).press("Enter")
    started.value.save_as(tmp_path / "shift.zip")
    shutil.unpack_archive(tmp_path / "shift.zip", tmp_path)
    assert sealign.load_edit(tmp_path / "shift").strength == 1.5
    expect(edit).to_contain_text("Downloaded shift.zip")
    # Pushed, with the token of the machine, which the page never has.
    with hub_stand_in(monkeypatch, tmp_path / "hub") as hub:
        edit.get_by_text("Push to the Hub").press("Enter")
        repository = page.get_by_label("Repository to push shift to")
        repository.fill("me/shift")
        edit.get_by_role("button", name="Push").press("Enter")
        expect(edit.get_by_role("link")).to_contain_text(f"{hub.url}/me/shift/commit/")
        assert hub.repositories["me/shift"].keys() >= {"edit.json", "edit.safetensors"}
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        edit.get_by_role("button", name="Push").click()
        expect(edit).to_contain_text("Error: the edit cannot be uploaded to 'me/shift' without a login to the Hub")
        assert "hf_of_the_stand_in" not in page.content()
    assert visitor.fits()
    page.screenshot(path=tmp_path / "downloads.png", full_page=True)
    visitor.close()


def test_a_page_of_a_server_says_what_it_lacks(browser: Any, tokenizer: Any) -> None:
    model = planted_model(len(tokenizer))
    with running(StubServer(model, tokenizer, {}).application) as stub:
        application = playground_application(ServedPlayground(stub, []))
        with running(application) as url:
            visitor = Visitor(browser, url)
            visitor.page.get_by_text("Fit an edit").press("Enter")
            assert visitor.page.locator("#fitting p").inner_text() == f"{NOT_OFFERED}."
            assert visitor.page.locator("#fitting").get_by_role("button").count() == 0
            visitor.close()
