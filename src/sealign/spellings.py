"""British and American spellings of the names of settings and options, both of which are found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from sealign.errors import SettingError

Value = TypeVar("Value")

SPELLINGS = (
    ("behaviour", "behavior"),
    ("centre", "center"),
    ("centred", "centered"),
    ("colour", "color"),
    ("favour", "favor"),
    ("isation", "ization"),
    ("ise", "ize"),
    ("ised", "ized"),
    ("labelled", "labeled"),
    ("neighbour", "neighbor"),
)
"""Pairs of a British spelling of a word, or of its end, and the American one; a plural has the same with an s."""


def known_spelling(name: str, known: Iterable[str]) -> str:
    """Return the spelling of a name that is known, or the name itself if no spelling of it is.

    Args:
        name: Name of a setting or an option; its words are separated by dots, hyphens and underscores.
        known: Names that there are.

    Example:
        >>> known_spelling("--centred", ["--centered", "--rank"])
        '--centered'
        >>> known_spelling("--ranks", ["--centered", "--rank"])
        '--ranks'
    """
    names = set(known)
    if name in names:
        return name
    return next((other for other in sorted(names) if american(other) == american(name)), name)


def by_known_spelling(values: Mapping[str, Value], known: Iterable[str]) -> dict[str, Value]:
    """Return values by the known spelling of their names.

    Args:
        values: Values by name.
        known: Names that there are.

    Raises:
        SettingError: A name is given in both spellings.
    """
    names = set(known)
    found: dict[str, Value] = {}
    for name, value in values.items():
        spelled = known_spelling(name, names)
        if spelled in found or (spelled != name and spelled in values):
            raise SettingError(f"{spelled} is given twice, also as {name}; leave one out")
        found[spelled] = value
    return found


def american(name: str) -> str:
    """Return the American spelling of a name.

    Args:
        name: As for ``known_spelling``.

    Example:
        >>> american("normalisation"), american("--no-centred"), american("noise")
        ('normalization', '--no-centered', 'noise')
    """
    for mark in "._-":
        if mark in name:
            return mark.join(american(part) for part in name.split(mark))
    plural = "s" if name.endswith("s") and not name.endswith("ss") else ""
    word = name.removesuffix(plural) if plural else name
    if word in _ALIKE:
        return name
    for british, other in SPELLINGS:
        if word.endswith(british):
            return word.removesuffix(british) + other + plural
    return name


_ALIKE = ("advise", "noise", "otherwise", "precise", "promise", "raise", "revise", "rise", "wise", "advised", "raised")
"""Words that end like those with two spellings, but have one."""


def respelled(arguments: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return a command line with the names of options in the spelling, British or American, in which they are known.

    Args:
        arguments: The command line.
        known: Names of options.
    """
    found = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        found.append(known_spelling(flag, known) + equals + value if argument.startswith("--") else argument)
    return found
