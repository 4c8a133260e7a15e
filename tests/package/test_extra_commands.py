"""The list of commands by extra is complete."""

from __future__ import annotations

import tomllib

from tests.cli.test_app import commands
from tests.package.contents import ROOT
from tests.package.extra_commands import COMMANDS

NO_EXTRA = {"demo", "chat", "edits", "compare", "serve"}
"""Commands that need a terminal, the Hub, results or vLLM, which is not an extra; their own tests run them."""


def test_every_extra_has_commands_that_need_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = {name for names in COMMANDS for name in names.split(",")} - {"none"}
    assert listed == set(project["optional-dependencies"])


def test_every_command_is_run_with_its_extra_alone() -> None:
    run = {line.split()[0] for lines in COMMANDS.values() for line in lines}
    assert run == {name.split()[0] for name in commands()} - NO_EXTRA
