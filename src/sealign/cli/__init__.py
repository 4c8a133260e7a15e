"""The command line: each command parses its options, calls the library and prints the result.

Heavy modules are imported inside the commands, so that ``sealign --help`` is fast.
"""

from __future__ import annotations

import sealign.cli.cache
import sealign.cli.chat
import sealign.cli.compare
import sealign.cli.demo
import sealign.cli.edits
import sealign.cli.evaluate
import sealign.cli.export
import sealign.cli.fit
import sealign.cli.generate
import sealign.cli.inspect
import sealign.cli.playground
import sealign.cli.plot
import sealign.cli.reproduce
import sealign.cli.serve
import sealign.cli.tune
import sealign.cli.verify  # noqa: F401
from sealign.cli.app import app

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    app()
