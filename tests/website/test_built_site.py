"""The check of a built site, on a site with every kind of fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from website.built_site import find_faults


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site of two pages without a fault."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "style.css").write_text("body { background: url(deep/a%20b.png) }")
    (tmp_path / "deep" / "a b.png").write_bytes(b"")
    first = '<link href="style.css"><a href="deep/two.html#part">x</a><a href="https://a.org/#b">y</a><h1 id="top">'
    second = '<a name="part"></a><a href="/one.html#top">x</a><a href="#part">y</a>'
    images = '<img src="a%20b.png"><img src="data:,x">'
    (tmp_path / "one.html").write_text(first)
    (tmp_path / "deep" / "two.html").write_text(second + images)
    return tmp_path


def test_a_site_without_faults(site: Path) -> None:
    assert find_faults(site) == []


@pytest.mark.parametrize(
    ("page", "fault"),
    [
        ('<a href="deep/three.html">', "links to deep/three.html"),
        ('<a href="deep/two.html#whole">', "links to deep/two.html#whole"),
        ('<a href="#bottom">', "links to #bottom"),
        ('<a href="style.css#top">', "links to style.css#top"),
        ('<img src="deep/c.png">', "links to deep/c.png"),
        ('<img srcset="https://a.org/b.png">', "loads https://a.org/b.png"),
        ('<script src="https://a.org/b.js">', "loads https://a.org/b.js"),
        ('<link rel="stylesheet" href="//a.org/b.css">', "loads //a.org/b.css"),
    ],
)
def test_faults_of_a_page(site: Path, page: str, fault: str) -> None:
    (site / "three.html").write_text(page)
    assert find_faults(site) == [f"three.html {fault}"]


@pytest.mark.parametrize("rule", ["@import 'b.css';", "a { b: url(https://a.org) }", "a { b: url( '//a.org/b' ) }"])
def test_what_a_style_sheet_loads(site: Path, rule: str) -> None:
    (site / "other.css").write_text(rule)
    assert len(find_faults(site)) == 1
