"""The page of the playground in a browser."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import expect

import sealign
from sealign.playground.application import playground_application
from sealign.playground.offered_edits import OfferedEdits
from sealign.playground.playground import Playground
from tests.playground.stub_server import running
from tests.playground.visits import Visitor
from tests.tiny_models import build_model

pytestmark = pytest.mark.slow


@dataclass
class Served:
    """A playground that is served, and what it is made of."""

    url: str
    model: Any
    tokenizer: Any
    edit: sealign.Edit
    folder: Path

    def answer(self, text: str, length: int, strength: float | None) -> str:
        """What transformers answers, edited if there is a strength."""
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        ids = torch.tensor([self.tokenizer.encode(prompt, add_special_tokens=False)])
        settings: dict[str, Any] = {"max_new_tokens": length, "do_sample": False, "pad_token_id": 0}
        with sealign.apply_edit(self.model, self.edit, strength=strength or 0.0), torch.no_grad():
            output = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        return str(self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()


@pytest.fixture(scope="module")
def served(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = build_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)
    words = copy.deepcopy(tokenizer)
    words.chat_template = "{% if mood is defined %}{{ mood }} {% endif %}" + words.chat_template
    items = sealign.load_demonstrations("bundled:fairness", limit=6)
    config = sealign.SEAConfig(rank=(3, 2), layers=(1, 3), strength=0.7, batch_size=4)
    edit = sealign.fit_edit(model, words, items, config=config)
    mean = sealign.MeanDifferenceConfig(site="residual", layers=(1, 2), strength=2.0)
    shift = sealign.fit_edit(model, words, items, config=mean)
    folder = tmp_path_factory.mktemp("edits")
    shift.save_pretrained(folder / "late")
    offered = OfferedEdits(model, words, {"mild": edit, "shift": shift}, folder=folder)
    application = playground_application(Playground(model, words, offered, name="tiny model"))
    with running(application) as url:
        yield Served(url, model, words, edit, folder)


def set_strengths(page: Any, mild: float, shift: float | None = None) -> None:
    """Set the strength of one edit, and that of the other or switch it off."""
    page.get_by_label("Strength of mild", exact=True).fill(str(mild))
    page.get_by_label("shift", exact=True).set_checked(shift is not None)
    if shift is not None:
        page.get_by_label("Strength of shift", exact=True).fill(str(shift))


def squeezed(text: str) -> str:
    """A text without white space and the marks of tokens that have no text of their own."""
    return "".join(text.split()).replace("\N{HORIZONTAL ELLIPSIS}", "").replace("\N{REPLACEMENT CHARACTER}", "")


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_visit_by_mouse_and_keyboard(browser: Any, served: Served, tmp_path: Path, width: int, scheme: str) -> None:
    visitor = Visitor(browser, served.url, width=width, scheme=scheme)
    page = visitor.page

    assert page.title() == "Sealign playground"
    assert page.locator("#model").inner_text() == "Model: tiny model"
    assert visitor.fits()
    # A prompt of a bundled behaviour, by keyboard.
    page.focus("#preset")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator("#message")).not_to_have_value("")
    set_strengths(visitor.page, 3)
    prompt = page.input_value("#message")
    base, edited = visitor.say(prompt)
    assert squeezed(base) == squeezed(served.answer(prompt, 12, None))
    assert squeezed(edited) == squeezed(served.answer(prompt, 12, 3.0))
    assert base != edited
    exchange = page.locator(".exchange").first
    assert exchange.get_by_role("heading", name="Edited: mild 3").is_visible()
    # Tokens by mouse.
    tokens = exchange.locator(".edited .token:visible")
    assert tokens.count() == 12
    shares = tokens.evaluate_all("spans => spans.map(span => Number(span.style.getPropertyValue('--share')))")
    assert all(0 <= share <= 1 for share in shares)
    assert len(set(shares)) > 6
    tokens.nth(4).hover()
    detail = exchange.locator(".detail")
    assert "KL" in detail.inner_text()
    assert detail.locator("table").count() == 2
    assert detail.locator("tr").count() == 10
    hovered = detail.inner_text()
    # And by keyboard: from the message backwards to the tokens, then along them.
    page.focus("#message")
    for _ in range(4):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.getAttribute('role')") == "listbox":
            break
    page.keyboard.press("ArrowRight")
    assert tokens.nth(5).get_attribute("aria-selected") == "true"
    assert detail.inner_text() != hovered
    page.keyboard.press("Home")
    assert exchange.locator("[aria-selected=true]").count() == 1
    assert tokens.nth(0).get_attribute("aria-selected") == "true"
    assert visitor.fits()
    # Damage, by keyboard.
    page.focus("#measure")
    page.keyboard.press("Enter")
    expect(page.locator("#damage")).to_contain_text("nats per token")
    assert page.locator("#damage").inner_text().startswith("mild 3: loss ")
    # A second message continues the conversation.
    visitor.say("And water?")
    assert page.locator(".exchange").count() == 2
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert visitor.fits()
    page.click("#reset")
    assert page.locator(".exchange").count() == 0
    visitor.close()


@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_stop(browser: Any, served: Served, by: str) -> None:
    visitor = Visitor(browser, served.url)
    page = visitor.page
    page.fill("#max-new-tokens", "1900")
    exchange = visitor.send("Tell me all.")
    exchange.locator(".edited .token").nth(4).wait_for(state="attached")
    assert page.locator("#send").is_disabled()
    if by == "mouse":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    exchange.locator(".mean").wait_for()
    assert "Stopped." in exchange.inner_text()
    count = exchange.locator(".edited .token").count()
    assert 4 < count < 1900
    # The model is free again, and what was said so far is part of the conversation.
    page.fill("#max-new-tokens", "12")
    visitor.say("What is ice?")
    assert exchange.locator(".edited .token").count() == count
    visitor.close()


def test_a_new_conversation_stops_the_answer(browser: Any, served: Served) -> None:
    visitor = Visitor(browser, served.url)
    visitor.page.fill("#max-new-tokens", "1900")
    visitor.send("Tell me all.")
    visitor.page.wait_for_selector(".edited .token", state="attached")
    visitor.page.click("#reset")
    visitor.page.wait_for_selector("#send:enabled")
    visitor.page.fill("#max-new-tokens", "12")
    set_strengths(visitor.page, 3)
    _, edited = visitor.say("What is ice?")
    assert squeezed(edited) == squeezed(served.answer("What is ice?", 12, 3.0))  # nothing was said before
    visitor.close()


def test_two_visitors_have_strengths_of_their_own(browser: Any, served: Served) -> None:
    visitors = [Visitor(browser, served.url) for _ in range(2)]
    strengths = (3.0, -4.0)
    for visitor, strength in zip(visitors, strengths, strict=True):
        set_strengths(visitor.page, strength)
    # Both at once: the second one waits, and is told.
    visitors[0].page.fill("#max-new-tokens", "400")
    first = visitors[0].send("What is ice?")
    visitors[0].page.wait_for_selector(".edited .token", state="attached")
    second = visitors[1].send("What is ice?")
    expect(visitors[1].page.locator("#status")).to_contain_text("1 request is before")
    for exchange, strength, length in ((first, 3.0, 400), (second, -4.0, 12)):
        exchange.locator(".mean").wait_for()
        found = exchange.locator(".edited .text").inner_text()
        assert squeezed(found) == squeezed(served.answer("What is ice?", length, strength))
    for visitor, strength in zip(visitors, strengths, strict=True):
        assert float(visitor.page.get_by_label("Strength of mild", exact=True).input_value()) == strength
        visitor.close()


def test_a_crash_leaves_the_page_usable(browser: Any, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    visitor = Visitor(browser, served.url)
    page = visitor.page
    forward, calls = type(served.model).forward, []

    def crash(*args: Any, **given: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("no memory is left")
        return forward(*args, **given)

    monkeypatch.setattr(type(served.model), "forward", crash)
    exchange = visitor.send("What is ice?")
    expect(page.locator("#problem")).not_to_be_empty()
    assert page.locator("#problem").inner_text().startswith("Error: the model failed (RuntimeError: no memory is left)")
    assert "not part of the conversation" in exchange.inner_text()
    assert page.input_value("#message") == "What is ice?"  # to be sent again
    monkeypatch.undo()
    set_strengths(visitor.page, 3)
    _, edited = visitor.say("What is ice?")
    assert squeezed(edited) == squeezed(served.answer("What is ice?", 12, 3.0))
    assert page.locator("#problem").inner_text() == ""
    visitor.close()


def test_settings_that_are_refused(browser: Any, served: Served) -> None:
    visitor = Visitor(browser, served.url)
    page = visitor.page
    for strength in ("1000.5", "-2000", ""):
        page.get_by_label("Strength of mild", exact=True).fill(strength)
        page.fill("#message", "What is ice?")
        page.press("#message", "Enter")
        expect(page.locator("#problem")).to_contain_text("Strength of mild: ")
        page.click("#measure")
        assert page.locator(".exchange").count() == 0
    set_strengths(visitor.page, 1000)
    page.fill("#template-arguments", "mood")
    page.click("#send")
    expect(page.locator("#problem")).to_contain_text("must be NAME=VALUE")
    page.fill("#template-arguments", "moood=1")
    page.click("#send")
    expect(page.locator("#problem")).to_contain_text("the argument 'moood'")
    assert not any(url.endswith("api/damage") for url in visitor.asked)
    visitor.close()


def test_switches_and_the_order_of_edits(browser: Any, served: Served) -> None:
    visitor = Visitor(browser, served.url)
    page = visitor.page
    set_strengths(visitor.page, 3, -2)
    _, both = visitor.say("What is ice?")
    page.click("#reset")
    for name in ("mild", "shift"):
        page.get_by_label(name, exact=True).set_checked(False)
    base, none = visitor.say("What is ice?")
    assert squeezed(base) == squeezed(none) != squeezed(both)
    assert page.locator(".mean").inner_text().startswith("KL from base: on average 0.000 nats per token")
    assert page.get_by_role("heading", name="Edited: no edit").is_visible()
    page.click("#measure")
    expect(page.locator("#problem")).to_contain_text("no edit is switched on")
    # A slider by keyboard moves the number, and the number the slider.
    slider = page.get_by_label("Strength of shift, slider")
    page.get_by_label("Strength of shift", exact=True).fill("1.6")
    assert slider.input_value() == "1.6"
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_label("Strength of shift", exact=True).input_value() == "1.68"
    visitor.close()


def test_an_edit_is_loaded_and_the_template_has_arguments(browser: Any, served: Served) -> None:
    visitor = Visitor(browser, served.url)
    page = visitor.page
    page.fill("#path", "../late")
    page.click("#load")
    expect(page.locator("#problem")).to_contain_text("outside the folder")
    for _ in range(2):  # the second time replaces the first
        page.fill("#path", "late")
        page.click("#load")
        expect(page.locator("#path")).to_have_value("")
    assert page.locator(".edit").count() == 3
    assert "mean_difference; residual, layers 1-2; own strength 2" in page.locator(".edit").nth(2).inner_text()
    set_strengths(visitor.page, 3)
    page.get_by_label("mild", exact=True).set_checked(False)
    _, late = visitor.say("What is ice?")
    page.click("#reset")
    page.get_by_label("/late", exact=True).set_checked(False)
    page.get_by_label("shift", exact=True).set_checked(True)
    assert visitor.say("What is ice?")[1] == late
    page.click("#reset")
    plain, _ = visitor.say("What is ice?")
    page.click("#reset")
    page.fill("#template-arguments", 'mood="cheerful"')
    assert visitor.say("What is ice?")[0] != plain
    page.click("#reset")
    page.fill("#template-arguments", "")
    page.fill("#system", "Be brief.")
    assert visitor.say("What is ice?")[0] != plain
    visitor.close()


def test_what_a_model_writes_is_text(browser: Any, served: Served) -> None:
    visitor = Visitor(browser, served.url)
    hostile = "<img src=x onerror=alert(1)><b>bold</b>"
    exchange = visitor.send(hostile)
    exchange.locator(".mean").wait_for()
    assert exchange.locator(".question").inner_text() == hostile
    assert exchange.locator("img, b").count() == 0
    visitor.close()
