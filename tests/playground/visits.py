"""Visits to a served playground in a browser."""

from __future__ import annotations

from typing import Any

from playwright.sync_api import expect


class Visitor:
    """A page in a browser of its own, and all that it says and asks for."""

    def __init__(self, browser: Any, url: str, *, width: int = 1400, scheme: str = "light") -> None:
        self.url, self.width = url, width
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.set_default_timeout(120_000)
        expect.set_options(timeout=120_000)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)
        self.page.wait_for_selector("#model:not(:text('Loading'))")
        self.page.fill("#max-new-tokens", "12")

    def send(self, text: str) -> Any:
        """Send a message, and return the locator of its exchange."""
        before = self.page.locator(".exchange").count()
        self.page.fill("#message", text)
        self.page.press("#message", "Enter")
        return self.page.locator(".exchange").nth(before)

    def say(self, text: str) -> tuple[str, str]:
        """Send a message, and return both answers when the tokens are compared."""
        exchange = self.send(text)
        exchange.locator(".mean").wait_for()
        return tuple(exchange.locator(f".{arm} .text").inner_text().strip() for arm in ("base", "edited"))  # type: ignore[return-value]

    def fits(self) -> bool:
        """Whether nothing is wider than the window."""
        return bool(self.page.evaluate("document.documentElement.scrollWidth") <= self.width)

    def close(self) -> None:
        """Close the page; it has said nothing on the console, and asked nobody but the playground."""
        assert self.said == [], self.said
        others = [url for url in self.asked if not url.startswith((self.url, "data:", f"blob:{self.url}"))]
        assert others == [], others
        self.context.close()
