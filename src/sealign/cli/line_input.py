"""Lines that a user types: with editing and a history on a terminal, plain otherwise."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from pathlib import Path

from sealign.cli.consoles import output

HISTORY_NAME = "chat_history"
"""File name of the history in the cache folder."""

HISTORY_LENGTH = 1000
"""Largest number of lines in the history."""


class LineInput:
    """Reader of lines. Where Python has no readline, as on Windows, the system's own editing is what there is.

    Args:
        history: File of the history; only the user may read it. It is not written when lines do not come from a
            terminal.
    """

    def __init__(self, history: Path) -> None:
        self._history = history
        self._readline = None
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            return
        with suppress(ImportError):
            import readline

            readline.set_history_length(HISTORY_LENGTH)
            readline.set_auto_history(False)
            with suppress(OSError):  # there is none yet
                readline.read_history_file(history)
            self._readline = readline

    def read(self, prompt: str) -> str:
        """Return the next line, without blanks around it.

        Args:
            prompt: Prompt in rich markup.

        Raises:
            EOFError: There is no further line.
        """
        if self._readline is None:
            return output.input(prompt).strip()
        with output.capture() as captured:
            output.print(prompt, end="")
        # Readline must know which characters of the prompt take no space.
        line = input(re.sub(r"(\x1b\[[0-9;]*m)", "\x01\\1\x02", captured.get())).strip()
        if line:
            self._readline.add_history(line)
            self._save()
        return line

    def _save(self) -> None:
        """Write the history, so that a chat that is killed keeps it too."""
        assert self._readline is not None
        with suppress(OSError):  # a history that cannot be written is not worth ending a chat for
            self._history.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._history, os.O_CREAT | os.O_WRONLY, 0o600))
            self._readline.write_history_file(self._history)
