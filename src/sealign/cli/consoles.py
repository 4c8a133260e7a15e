"""The consoles that commands print to: results to standard output, progress, log and errors to standard error."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.markup import escape

from sealign.errors import SealignWarning

output: Console = Console(highlight=False)
"""Console of the results: standard output."""


class _Messages(Console):
    """Console whose status off a terminal is a line, if what it describes takes long."""

    seconds_between_lines: float = 15.0
    """Time after which progress that is not on a terminal is a line, once and again."""

    shows_progress: bool = True
    """Whether progress is shown."""

    def say(self, what: str) -> None:
        """Print a line of progress."""
        if self.shows_progress:
            self.print(what, markup=False, soft_wrap=True)

    def status(self, status: Any, **settings: Any) -> Any:
        if not self.shows_progress:
            return nullcontext()
        return super().status(status, **settings) if self.is_terminal else self._say_if_slow(str(status))

    @contextmanager
    def _say_if_slow(self, what: str) -> Iterator[None]:
        timer = threading.Timer(self.seconds_between_lines, lambda: self.say(f"{what} ..."))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


messages: _Messages = _Messages(stderr=True, highlight=False)
"""Console of progress and errors: standard error."""


class _LogLines(logging.Handler):
    """Handler that prints records among the messages, without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        messages.print(self.format(record), markup=False, soft_wrap=True, style="dim")


_show_other_warning = warnings.showwarning


def show_warning(message: Warning | str, category: type[Warning], *place: Any, **settings: Any) -> None:
    """Print a warning of Sealign as one line, and others as Python does; for ``warnings.showwarning``.

    Args:
        message, category: The warning.
        *place, **settings: Where it was raised, as Python gives it.
    """
    if issubclass(category, SealignWarning):
        messages.print(f"[bold yellow]warning:[/] {escape(str(message))}", soft_wrap=True)
    else:
        _show_other_warning(message, category, *place, **settings)


def print_log(verbosity: int) -> None:
    """Print the records of the library's loggers, from now on.

    Args:
        verbosity: 0 for none, 1 for those of INFO and above, 2 or more for those of DEBUG as well.
    """
    logger = logging.getLogger("sealign")
    logger.handlers = [each for each in logger.handlers if not isinstance(each, _LogLines)]
    logger.setLevel((logging.NOTSET, logging.INFO, logging.DEBUG)[min(verbosity, 2)])
    if verbosity:
        handler = _LogLines()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
