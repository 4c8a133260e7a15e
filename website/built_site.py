"""Check of the pages that were built: every link leads somewhere, and nothing is loaded from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = re.compile(r"""@import|url\(\s*["']?(?:https?:)?//""")
"""What a style sheet loads from elsewhere."""


class _Page(HTMLParser):
    """The anchors, links and loaded files of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors = {""}
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag != "a":
            self.loaded += [found[name] for name in ("src", "href", "srcset", "poster", "data") if name in found]


def find_faults(site: Path) -> list[str]:
    """Return what is wrong with the links of a built site, a line each.

    Args:
        site: Folder of the site.
    """
    pages = {path.resolve(): _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    faults = []
    for path, page in pages.items():
        for target in [*page.links, *page.loaded]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if target in page.loaded and parts.scheme != "data":
                    faults.append(f"{path.relative_to(site.resolve())} loads {target}")
                continue
            folder = site if parts.path.startswith("/") else path.parent  # the page for what is not found
            found = (folder / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            anchors = pages[found].anchors if found in pages else {""}
            if not found.exists() or unquote(parts.fragment) not in anchors:
                faults.append(f"{path.relative_to(site.resolve())} links to {target}")
    for sheet in sorted(site.rglob("*.css")):
        loaded = LOADED.findall(sheet.read_text(encoding="utf-8"))
        faults += [f"{sheet.relative_to(site)} loads by {one}" for one in loaded]
    return faults
