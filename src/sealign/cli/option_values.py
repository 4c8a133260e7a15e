"""Values of options: what the library takes, from the texts of a command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sealign.demonstrations.demonstration import Demonstration
    from sealign.models.sampling import Sampling


def load_sources(
    sources: Sequence[str],
    data_dir: Path | None,
    limit: int | None,
    seed: int,
    columns: str | None = None,
    *,
    tasks: str = "",
) -> list[Demonstration]:
    """Return the demonstrations of several sources as one list.

    Args:
        sources: Values of ``--demonstrations``.
        data_dir: Value of ``--data-dir``.
        limit: Value of ``--demonstrations-limit``.
        seed: Value of ``--seed``.
        columns: Value of ``--columns``.
        tasks: Value of ``--tasks``, which read the data folder, too.

    Raises:
        SettingError: An option would have no effect, since nothing is read that it acts on.
        DemonstrationError: A source cannot be read.
    """
    from sealign.demonstrations.sources import NAMED_SOURCES, load_demonstrations
    from sealign.errors import SettingError

    if not sources:
        given = {"--columns": columns, "--demonstrations-limit": limit}
        check_absent(given, "--demonstrations, of which there are none")
    if data_dir is not None and not names(tasks) and not NAMED_SOURCES.keys() & set(sources):
        raise SettingError(
            f"--data-dir is {data_dir}, but nothing is read from it, neither tasks nor one of the data sets "
            f"{', '.join(NAMED_SOURCES)}; leave it out"
        )
    named = named_values(names(columns or ""), "--columns", "prompt=question")
    loaded = [
        load_demonstrations(source, columns=named, data_dir=data_dir, limit=limit, seed=seed) for source in sources
    ]
    return [item for part in loaded for item in part]


def names(text: str) -> list[str]:
    """Return the names in a comma-separated text."""
    return [name.strip() for name in text.split(",") if name.strip()]


def check_limit(limit: int | None, tasks: str) -> None:
    """Raise an error if ``--limit`` is given and there are no tasks whose items it limits.

    Args:
        limit: Value of ``--limit``.
        tasks: Value of ``--tasks``.

    Raises:
        SettingError: The option would have no effect.
    """
    from sealign.errors import SettingError

    if limit is not None and not names(tasks):
        raise SettingError(
            f"--limit is {limit}, but it limits the items of --tasks, of which there are none; leave it out, or limit "
            "demonstrations with --demonstrations-limit"
        )


def check_absent(given: Mapping[str, object], what: str) -> None:
    """Raise an error if an option is given that would have no effect.

    Args:
        given: Values by name of the option; None where it was not given.
        what: What the options are for, and that it is lacking.

    Raises:
        SettingError: A value is not None.
    """
    from sealign.errors import SettingError

    for option, value in given.items():
        if value is not None:
            raise SettingError(f"{option} is for {what}; leave it out")


def strengths(text: str | None) -> list[float]:
    """Return the values of ``--strength``, each once; an empty list if it was not given.

    Args:
        text: Numbers, separated by commas.

    Raises:
        SettingError: There is no number, or a part is no strength.
    """
    from sealign.edits.strength import check_strength
    from sealign.errors import SettingError

    if text is None:
        return []
    found = [check_strength(part) for part in names(text)]
    if not found:
        raise SettingError(f"--strength is '{text}', but it must be a number, or several such as 0.5,1,2")
    return list(dict.fromkeys(found))


def sampling(temperature: float | None, top_p: float | None, seed: int | None) -> Sampling | None:
    """Return how tokens are drawn, or None for greedy decoding.

    Args:
        temperature: Value of ``--temperature``.
        top_p: Value of ``--top-p``.
        seed: Value of ``--seed``.

    Raises:
        SettingError: A value is out of range, or has no effect without a temperature.
    """
    from sealign.errors import SettingError
    from sealign.models.sampling import Sampling

    given: dict[str, Any] = {"top_p": top_p, "seed": seed}
    used = {name: value for name, value in given.items() if value is not None}
    if temperature is not None:
        return Sampling(temperature=temperature, **used)
    for name, value in used.items():
        raise SettingError(
            f"--{name.replace('_', '-')} is {value}, but greedy decoding draws no tokens; add --temperature 0.7, or "
            "leave it out"
        )
    return None


def named_values(given: Sequence[str] | None, option: str = "--set", example: str = "heads=24") -> dict[str, str]:
    """Return the values of an option such as ``--set`` by name.

    Args:
        given: Texts such as ``heads=24``.
        option: Name of the option, for messages.
        example: A value of the option, for messages.

    Raises:
        SettingError: A text has no name or no value, or a name is given twice.
    """
    from sealign.errors import SettingError

    found: dict[str, str] = {}
    for text in given or ():
        name, _, value = (part.strip() for part in text.partition("="))
        if not (name and value):
            raise SettingError(f"{option} is '{text}', but it must be a name and a value, such as {example}")
        if name in found:
            raise SettingError(f"{option} gives {name} twice; leave one out")
        found[name] = value
    return found


def template_arguments(given: Sequence[str] | None) -> dict[str, Any]:
    """Return the values of ``--chat-template-arg`` by name: JSON values where the text is JSON, else texts.

    Raises:
        SettingError: A text has no name or no value, or a name is given twice.
    """
    import json

    found: dict[str, Any] = {}
    for name, text in named_values(given, "--chat-template-arg", "enable_thinking=false").items():
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found
