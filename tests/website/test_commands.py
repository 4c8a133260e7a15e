"""The page of the commands against what each command prints as its help."""

from __future__ import annotations

import re

import pytest
import typer
from typer.testing import CliRunner

from sealign.cli.app import app
from sealign.methods.registry import METHODS
from website.commands import commands_page

OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


@pytest.fixture(scope="module")
def sections() -> dict[str, str]:
    """The text below each heading of the page."""
    found = re.split(r"^#+ (.+)\n", commands_page(), flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


def _help(*words: str) -> str:
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "4000"})
    assert result.exit_code == 0
    return result.stdout


def _named(section: str) -> set[str]:
    """Return the options that a section describes, not those that it mentions."""
    return {option for line in re.findall(r"^`(.+)`$", section, re.MULTILINE) for option in OPTION.findall(line)}


def _listed(help_text: str) -> set[str]:
    """Return the options in the first columns of the tables of a help text."""
    rows = [line for line in help_text.splitlines() if line.startswith("│")]
    lines = [re.split(r"(?<=\S) {2,}(?=[A-Z][a-z])", row)[0] for row in rows]
    return {option for line in lines for option in OPTION.findall(line)} - {"--help"}


def _leaves(command: object, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    inner = getattr(command, "commands", {})
    return [leaf for name, one in inner.items() for leaf in _leaves(one, (*words, name))] if inner else [words]


COMMANDS = _leaves(typer.main.get_command(app))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_each_command_has_its_options_and_defaults(words: tuple[str, ...], sections: dict[str, str]) -> None:
    section, shown = sections[f"sealign {' '.join(words)}"], _help(*words)
    listed = _listed(shown)
    if words == ("fit",):
        section += sections["Settings of sea"]
    assert listed
    assert _named(section) == listed
    plain = section.replace("\\", "")
    for default in re.findall(r"\[default: .*?(?=\])", shown):
        assert default in plain


@pytest.mark.parametrize("method", METHODS)
def test_fit_has_the_settings_of_each_method(method: str, sections: dict[str, str]) -> None:
    listed = _listed(_help("fit", "--method", method))
    assert _named(sections["sealign fit"]) | _named(sections[f"Settings of {method}"]) == listed


def test_text_of_the_help_is_neither_markup_nor_markdown(sections: dict[str, str]) -> None:
    assert "[bold]" not in "".join(sections.values())
    assert r"\[default: 0\]" in sections["sealign fit"]
    assert r"best\_of\_n" in sections["sealign fit"]
