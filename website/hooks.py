"""Hooks of mkdocs: the pages that are not in ``docs/``, and the check of what was built."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from website.built_site import find_faults
from website.compatibility import compatibility_page
from website.notebooks import notebook_page
from website.reference import reference_pages

ROOT = Path(__file__).resolve().parents[1]
ROOT_PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
COMMANDS = ROOT / "build" / "commands.md"
"""Written by ``make docs`` before the site, in the environment that has the application."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root folder and those that are generated.

    Args:
        files: Files of ``docs/``.
        config: Configuration of the site.
    """
    pages = {name: (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](") for name in ROOT_PAGES}
    pages |= {"commands.md": COMMANDS.read_text(encoding="utf-8"), "compatibility.md": compatibility_page(ROOT)}
    pages["site.css"] = (ROOT / "website" / "site.css").read_text(encoding="utf-8")
    pages |= {f"reference/{module}.md": text for module, text in reference_pages(ROOT / "src" / "sealign").items()}
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        files.remove(files.src_uris[f"notebooks/{notebook.name}"])  # shown as a page, and not offered as a file
        pages[f"notebooks/{notebook.stem}.md"] = notebook_page(notebook)
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Return a page with links to where the site has pages of the root folder, beside ``docs/``, and of notebooks.

    Args:
        markdown: Text of the page.
        page: The page.
    """
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(r"\]\((notebooks/\w+)\.ipynb\b", r"](\1.md", markdown)
    return re.sub(rf"\]\({re.escape(up)}\.\./(?=\w+\.md)", f"]({up}", markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site with links that lead nowhere, or with pages that load anything from elsewhere.

    Args:
        config: Configuration of the site.

    Raises:
        PluginError: There are such links.
    """
    faults = find_faults(Path(config.site_dir))
    if faults:
        raise PluginError("\n".join(["the site has faults:", *faults]))
